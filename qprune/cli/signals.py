"""What SIGTERM and SIGINT do outside of training, which saves its state by itself."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

_asked: list[str] = []  # signals that came inside `stopping`


class Stopped(KeyboardInterrupt):
    """A signal outside of training, which saves its state by itself; its text names it."""


@contextmanager
def stopping() -> Iterator[None]:
    """Raise Stopped at SIGTERM and SIGINT inside, unless somebody else handles them."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = "SIGTERM" if number == signal.SIGTERM else "SIGINT (Ctrl-C)"
        if number == signal.SIGTERM and name in _asked:
            return  # `timeout` sends it twice, and the first one is being answered
        _asked.append(name)
        raise Stopped(name)

    with ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
                if signal.getsignal(number) == default:
                    _asked.clear()
                    handlers.callback(signal.signal, number, signal.signal(number, stop))
        try:
            yield
        except Exception as error:  # perhaps what a library has made of Stopped, as Hydra's parser does
            if _asked:
                raise Stopped(_asked[0]) from error
            raise


def stop_if_asked() -> None:
    """Raise Stopped again: Python drops an exception that a callback raises, as one behind an import."""
    if _asked:
        raise Stopped(_asked[0])
