"""Placement policies side by side, in simulated time: what chapter 08 runs, counts and draws.

`worked` is a case small enough to follow by hand, `machine` the controller alone and its log, `oracle` what queueing theory
says, `learning` the estimates and their errors, `contest` the policies on bursts, `others` what three more of them are for,
`promises` what each policy keeps whatever comes; `*_plots` draw what those return.
"""
