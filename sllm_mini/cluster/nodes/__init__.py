"""A node of a live cluster: one machine's store, its workers, and what is said to it. Taught in chapter 08.

`messages` is what a driver says to a node and `agent` the node, whose instances each have a lane of orders (`lanes`) and fetch models
(`loads`, `fetching`). `program` is the process of an agent, here or on another machine, `remote` the driver's end of it, and
`mailbox` what is between them. `workers` is what an agent knows of a worker and says to it (`worker_messages`), `launchers` and
`threads` are the ways to start one, and `climbing` is what runs inside it. Importing this package costs nothing.
"""
