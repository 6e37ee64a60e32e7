"""Addresses and interfaces of this machine."""

import fcntl
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def own_address(there: str) -> str:
    """This machine's address on the way to another. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((there, 9))
        except OSError as error:
            raise ValueError(f"no network here leads to {there}: {error.strerror}") from error
        return str(probe.getsockname()[0])


def is_here(address: str) -> bool:
    """Whether an address is this machine's: only those can be listened at."""
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


def interface_of(address: str) -> str | None:
    """The interface with an address; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                said = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(said[20:24]) == address:
                return name
    return None
