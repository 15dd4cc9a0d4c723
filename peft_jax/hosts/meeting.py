"""All processes meet before JAX starts, so that one that is missing is an error with its number and the address.

JAX's own client ends the process with a stack trace when it cannot reach the coordinator, or when others are late.
Here process 0 listens at the coordinator's address until every other process has called, tells all of them to go on (or
what is wrong), and leaves the port to JAX.
"""

import contextlib
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
    local = host in (name.strip("[]") for name in LOOPBACK)
    family = socket.AF_INET6 if ":" in host or (not local and socket.has_dualstack_ipv6()) else socket.AF_INET
    where = (host if local else "", port)
    try:
        server = socket.create_server(where, family=family, dualstack_ipv6=family == socket.AF_INET6 and not local)
    except OSError as error:
        raise OSError(
            f"process 0 cannot listen at {place.coordinator} ({error.strerror or error}): choose another MASTER_PORT"
        ) from None
    callers: dict[int, socket.socket] = {}
    with server, contextlib.ExitStack() as open_sockets:
        wrong = ""
        while len(callers) < place.processes - 1 and not wrong:
            if time.monotonic() > deadline:
                missing = [i for i in range(1, place.processes) if i not in callers]
                names = f"process{'es' * (len(missing) > 1)} {', '.join(map(str, missing))} of {place.processes}"
                wrong = (
                    f"{names} did not come to {place.coordinator} within {timeout:g} s: look at their output, and "
                    "whether they can reach that address"
                )
                break
            server.settimeout(_left(deadline))
            with contextlib.suppress(OSError):
                caller, _ = server.accept()
                open_sockets.enter_context(caller)
                caller.settimeout(_left(deadline))
                said = _receive(caller).split()
                if len(said) != 3 or said[0] != _HELLO or not (said[1] + said[2]).isdigit():
                    continue  # somebody else's connection
                process, processes = int(said[1]), int(said[2])
                if processes != place.processes:
                    wrong = f"process {process} says that there are {processes} processes, and process 0 says "
                    wrong += f"{place.processes}: give all of them the same number"
                elif process in callers:
                    wrong = f"two processes say that they are process {process} of {processes}: give each its own number"
                callers.setdefault(process, caller)
        for caller in callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(f"{wrong or _GO}\n".encode())
                caller.settimeout(_left(deadline))
                caller.recv(1)  # the caller closes first: the port is free at once
    if wrong:
        raise (TimeoutError if "did not come" in wrong else ValueError)(wrong)


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
        time.sleep(min(0.5, max(0.0, deadline - time.monotonic())) + 0.01)


def _receive(line: socket.socket) -> str:
    """One line of text, or what came of it."""
    data = b""
    while not data.endswith(b"\n") and len(data) < _LONGEST and (more := line.recv(_LONGEST)):
        data += more
    return data.decode()
