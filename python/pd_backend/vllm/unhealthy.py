"""What becomes of an engine whose KV path is given up for good."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal

from ..errors import PdError

logger = logging.getLogger("vllm.pd_backend")


def end_engine(why: PdError) -> None:
    """Ends this worker's process as a signal from outside would. vLLM notices: `/health` says 503, and the server ends.

    vLLM asks connectors nothing about health, and an engine that stays answers 200 while every request fails. A program that has the
    engine in its own process is left alone: its requests say why they fail.
    """
    if multiprocessing.parent_process() is None:
        return
    logger.critical("the KV path of this engine is given up, so the engine ends: %s", why)
    os.kill(os.getpid(), signal.SIGTERM)
