"""The connector for vLLM: `PdConnector` in `pd_backend.vllm.connector`.

    --kv-transfer-config '{"kv_connector": "PdConnector", "kv_connector_module_path": "pd_backend.vllm.connector", ...}'

Only that module and `engine` import vLLM; the others here are plain Python:

    options     what `kv_connector_extra_config` may say
    keys        names of chunks, that prefill and decode compute independently
    engine      what is read of vLLM's configuration
    layout      what the two daemons compare before they talk
    spec        what a router says of a request: `disagg_spec`, or NIXL's fields
    transfer_id what it says in Mooncake's dialect, and in MoRIIO's
    bootstrap   how a prefill server says where it is asked, in Mooncake's dialect
    bootstrap_query   asks for it
    bootstrap_server  says so, at prefill
    prefill_servers   whom a decode server has asked
    metaserver  the dialect in which decode has the router ask prefill
    deadline    an end for connections
    hosts       which hosts decode may ask
    step        what the scheduler's side tells the workers, step by step
    adapters    what a LoRA adapter is
    naming      which requests can be named: the others are computed where they arrived
    halves      which part a request is for, at a server that does both
    scheduler   the two scheduler sides
    checkpoint  what a model is that was loaded
    weights     whether it still is what was loaded
    whereabouts where the daemons are, for the scheduler, and how it resets them
    finder      look-ups at the receivers of a decode server, for the scheduler
    attachment  the client of a worker's daemon, for the one or two sides of the worker
    producer    the worker's side of prefill
    consumer    the worker's side of decode
    turns       chunks of a conversation's turn before, which prefill asks other servers for
    pairing     whether a pd-sender can talk to the receivers that it is told of, before the engine serves
    supervisor  the daemon of a worker: launched, watched, restarted
"""
