"""Messages between processes over stream sockets, written once: schemas, framing, descriptor passing, listening on Unix sockets and TCP.

The store's socket (chapter 05), migration channels (chapter 07) and cluster nodes (chapter 08) all speak this.

    class Ping(Message, frozen=True): ...
    class Pong(Message, frozen=True): ...

    server: channel = Channel(listen(path).accept(), Ping, name="client");  channel.receive();  channel.send(Pong())
    client: channel = Channel(connect(path), Pong, name="server");  channel.send(Ping());  channel.receive()

A channel that receives several kinds is a `Channel[Ping | Pong]`, made with `Ping | Pong`.
"""

from sllm_mini.wire.channel import MAX_FDS, BytesLike, Channel, Received
from sllm_mini.wire.connections import Connections
from sllm_mini.wire.listener import Listener, Peer, connect, listen, peer
from sllm_mini.wire.message import ChannelClosed, Message, WireTimeout
from sllm_mini.wire.tcp import get_key, is_tcp, set_key

__all__ = ["MAX_FDS", "BytesLike", "Channel", "ChannelClosed", "Connections", "Listener", "Message", "Peer", "Received", "WireTimeout", "connect", "get_key", "is_tcp", "listen", "peer", "set_key"]
