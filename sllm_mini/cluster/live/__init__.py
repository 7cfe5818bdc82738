"""The live cluster: one thread that decides, nodes that carry out. Importing this package costs nothing. Taught in chapter 08.

`driver` is the loop, `carry` makes orders of actions and events of answers, `options` is how both and the nodes behave.
"""
