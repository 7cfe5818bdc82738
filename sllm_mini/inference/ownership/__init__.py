"""Whose a request is, and what its reader has been told: so that whichever engine dies, a reader sees no gap and no repeat.

`register` says who may speak for a request, as a number that grows with each owner; `ledger` keeps what was said, and
takes it from the present owner only; `feed` brings it there from an engine; `server` is both for other processes, in
`messages`, and `lines` bring requests to them. Explained in chapter 07.
"""

from sllm_mini.inference.ownership.feed import TokenFeed
from sllm_mini.inference.ownership.ledger import TokenLedger
from sllm_mini.inference.ownership.lines import Line, Lines
from sllm_mini.inference.ownership.register import EpochRegister, Ownership, Register
from sllm_mini.inference.ownership.server import OwnershipClient, OwnershipServer

__all__ = ["EpochRegister", "Line", "Lines", "Ownership", "OwnershipClient", "OwnershipServer", "Register", "TokenFeed", "TokenLedger"]
