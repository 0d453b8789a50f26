"""The message that a sender tells the proxy with."""

import msgspec


class ProxyNotif(msgspec.Struct, tag=True):
    req_id: str


PDMsg = ProxyNotif
