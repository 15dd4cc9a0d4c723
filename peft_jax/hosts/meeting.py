"""All processes meet before JAX starts, so that one that is missing is an error with its number and the address.

JAX's own client ends the process with a stack trace when it cannot reach the coordinator, or when others are late.
Here process 0 listens at the coordinator's address until every other process has called, tells all of them to go on (or
what is wrong), and leaves the port to JAX.
"""

import contextlib
import os
import socket
import time

from peft_jax.hosts.variables import LOOPBACK, Place

_HELLO, _GO, _LONGEST = "peft_jax", "go", 2000


def meet(place: Place, timeout: float) -> None:
    """Returns once all processes are there; at most `timeout` seconds later raises.

    Raises:
        TimeoutError: if process 0 cannot be reached, or processes have not come, with the address and what to do.
        ValueError: if two processes say that they are the same one, or they disagree on how many they are.
        OSError: if process 0 cannot listen at the address.
    """
    deadline = time.monotonic() + timeout
    if place.process == 0:
        _listen(place, deadline, timeout)
    else:
        _call(place, deadline, timeout)


def split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _left(deadline: float, most: float = 5.0) -> float:
    return max(0.05, min(most, deadline - time.monotonic()))


# -- process 0 --------------------------------------------------------------------------------------------------------


def _listen(place: Place, deadline: float, timeout: float) -> None:
    host, port = split(place.coordinator)
    local = place.coordinator.rpartition(":")[0] in LOOPBACK
    six = ":" in host if local else socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        server = socket.create_server((host if local else "", port), family=family, dualstack_ipv6=six and not local)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            f"process 0 cannot listen at {place.coordinator} ({reason}): choose another MASTER_PORT"
        ) from None
    callers: dict[int, socket.socket] = {}
    with server, contextlib.ExitStack() as opened:
        wrong: Exception | None = None
        try:
            while len(callers) < place.processes - 1:
                _accept(server, callers, opened, place, deadline, timeout)
        except (ValueError, TimeoutError) as error:
            wrong = error
        for caller in callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(f"{wrong or _GO}\n".encode())
                caller.settimeout(1.0)
                caller.recv(1)  # the caller closes first: so the port is free at once
    if wrong is not None:
        raise wrong


def _accept(
    server: socket.socket,
    callers: dict[int, socket.socket],
    opened: contextlib.ExitStack,
    place: Place,
    deadline: float,
    timeout: float,
) -> None:
    """Takes one more call, if it is one of ours."""
    if time.monotonic() > deadline:
        missing = [str(i) for i in range(1, place.processes) if i not in callers]
        raise TimeoutError(
            f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {place.processes} did not come to "
            f"{place.coordinator} within {timeout:g} s: look at their output, and whether they can reach that address"
        )
    server.settimeout(_left(deadline))
    try:
        caller, _ = server.accept()
        opened.enter_context(caller)
        caller.settimeout(_left(deadline))
        said = _receive(caller).split()
    except (OSError, UnicodeDecodeError):
        return
    if len(said) != 3 or said[0] != _HELLO or not (said[1] + said[2]).isdigit():
        return  # somebody else's connection
    process, processes = int(said[1]), int(said[2])
    again = process in callers or process == 0
    callers[process if not again else -1 - len(callers)] = caller
    if processes != place.processes:
        raise ValueError(
            f"process {process} says that there are {processes} processes, and process 0 says {place.processes}: give "
            "all of them the same number"
        )
    if again:
        raise ValueError(f"two processes say that they are process {process} of {processes}: number them from 0")


# -- the others -------------------------------------------------------------------------------------------------------


def _call(place: Place, deadline: float, timeout: float) -> None:
    where, reason = split(place.coordinator), "no answer"
    while True:
        try:
            with socket.create_connection(where, timeout=_left(deadline)) as line:
                line.sendall(f"{_HELLO} {place.process} {place.processes}\n".encode())
                line.settimeout(max(0.05, deadline - time.monotonic()) + 5)  # process 0 gives up first, and says why
                said = _receive(line).strip()
            if said == _GO:
                return
            if said:
                raise ValueError(said)
            reason = "the connection was closed without a word"
        except (UnicodeDecodeError, TimeoutError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"process {place.process} of {place.processes} cannot reach the coordinator at {place.coordinator} "
                f"after {timeout:g} s ({reason}): see that process 0 runs there, and that the address "
                f"({place.told_by}) and its port are right and open between the hosts"
            )
        time.sleep(min(0.5, timeout / 20))


def _receive(line: socket.socket) -> str:
    """One line of text, or what came of it."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _LONGEST and (more := line.recv(_LONGEST)):
        data += more
    return data.decode()
