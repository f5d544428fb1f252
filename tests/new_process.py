"""Runner of a function in a new process that has imported torch and called no op.

The process is forked from a server that has imported the slow modules once.
"""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

# Modules that would otherwise be imported in each process. The list serves all tests, because only
# the first start of the fork server reads it.
PRELOADED = ["pytest", "torch", "splade_fast.negative_cache", "splade_fast.training.trainer"]


def fork_server() -> Any:
    """Return the multiprocessing context whose processes start with the preloaded modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def call_in_new_process(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str]
) -> Any:
    """Return function(*arguments) of a new process with additional variables of the environment.

    Raises:
        AssertionError: the function raised an error or ended its process.
    """
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    # Pickled here, so that the process imports the function's module after it has the variables.
    call = pickle.dumps((function, arguments))
    process = context.Process(target=_call, args=(sender, dict(environment), call))
    process.start()
    sender.close()
    try:
        is_returned, result = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the process ended with {process.exitcode}") from None
    process.join()
    assert is_returned, result
    return result


def _call(sender: Connection, environment: dict[str, str], call: bytes) -> None:
    os.environ.update(environment)
    try:
        function, arguments = pickle.loads(call)
        result = True, function(*arguments)
    except BaseException:
        result = False, traceback.format_exc()
    sender.send(result)
