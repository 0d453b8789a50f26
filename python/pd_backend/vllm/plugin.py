"""Makes `"kv_connector": "PdConnector"` known to vLLM, which calls this by the entry point `vllm.general_plugins`."""

from contextlib import suppress


def register() -> None:
    """May be called several times in a process."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    with suppress(ValueError):  # It is known already.
        KVConnectorFactory.register_connector("PdConnector", "pd_backend.vllm.connector", "PdConnector")
