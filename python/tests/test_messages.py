"""The structs against the bytes that the daemons are tested with (tests/connector_messages.rs), and against the docs."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from pd_backend import Kind
from pd_backend import messages as m

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
GOLDEN = json.loads((HERE / "connector_messages.json").read_text())
# Rust writes this field even where it is 0; leaving it out means the same.
WRITES_LESS = {"send whole slots"}


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: f"{golden['from']}: {golden['name']}")
def test_a_message_has_the_bytes_that_the_daemons_expect(golden):
    # Broken in production: client and daemon disagree about a field's name or type, and nothing works.
    decode, union = (
        (m.decode_request, m.Request) if golden["from"] == "client" else (m.decode_reply, m.Reply)
    )
    payload = bytes.fromhex(golden["msgpack"])
    message = decode(payload)
    assert message == msgspec.convert(golden["message"], union)
    assert decode(m.encode(message)) == message
    if golden["name"] not in WRITES_LESS:
        assert m.encode(message) == payload


def test_every_message_is_among_them():
    # Broken in production: a message that no test has ever encoded.
    def structs(union):
        return {struct.__struct_config__.tag for struct in union.__args__}

    for side, union in (("client", m.Request), ("daemon", m.Reply)):
        assert {golden["message"]["type"] for golden in GOLDEN if golden["from"] == side} == structs(union)


def shown(value, message):
    """Each field of each struct in a message that its JSON shows."""
    if isinstance(value, list | tuple):
        for item, one in zip(value, message, strict=True):
            yield from shown(item, one)
    elif isinstance(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            if field.encode_name in message:
                yield type(value), field.name
                yield from shown(getattr(value, field.name), message[field.encode_name])


def test_every_field_is_among_them():
    # Broken in production: a field is added or renamed here, and no daemon has it.
    seen = set()
    for golden in GOLDEN:
        union = m.Request if golden["from"] == "client" else m.Reply
        seen |= set(shown(msgspec.convert(golden["message"], union), golden["message"]))
    structs = [item for item in vars(m).values() if isinstance(item, type) and issubclass(item, msgspec.Struct)]
    fields = {(struct, field.name) for struct in structs for field in msgspec.structs.fields(struct)}
    assert len(structs) > 30
    assert fields == seen


def test_a_newer_daemons_fields_are_ignored():
    # Broken in production: a daemon that says more than before cannot be upgraded before its engines.
    reply = {"type": "accepted", "id": 4, "queued": 7}
    assert m.decode_reply(msgspec.msgpack.encode(reply)) == m.Accepted(id=4)


def test_what_is_no_message_is_refused():
    # Broken in production: garbage becomes a message with made-up fields.
    for wrong in ({"type": "surprise"}, {"id": 1}, [], {"type": "accepted"}, {"type": "accepted", "id": "1"}):
        with pytest.raises(msgspec.ValidationError):
            m.decode_reply(msgspec.msgpack.encode(wrong))
    with pytest.raises(msgspec.DecodeError):
        m.decode_reply(b"\xc1")


def messages_in(markdown):
    for block in re.findall(r"```json\n(.*?)```", markdown, re.DOTALL):
        for line in block.splitlines():
            direction, _, text = line.partition(" ")
            yield direction, text.strip()


def test_the_documentation_shows_messages_that_are_understood():
    # Broken in production: whoever writes a connector from docs/connector-api.md gets refusals.
    markdown = (TOP / "docs" / "connector-api.md").read_text()
    shown = set()
    for direction, text in messages_in(markdown):
        assert direction in (">", "<"), text
        decode, union = (m.decode_request, m.Request) if direction == ">" else (m.decode_reply, m.Reply)
        message = json.loads(text)
        fields = msgspec.convert(message, union, strict=True)
        assert decode(msgspec.msgpack.encode(message)) == fields
        known = {field.name for field in msgspec.structs.fields(type(fields))}
        assert set(message) - {"type"} <= known, text
        shown.add(message["type"])
    assert shown == {golden["message"]["type"] for golden in GOLDEN}


def test_the_documentation_explains_every_kind_of_failure():
    # Broken in production: an operator sees a kind that no page mentions.
    markdown = (TOP / "docs" / "connector-api.md").read_text()
    source = (TOP / "src" / "ids" / "failure.rs").read_text()
    kinds = set(re.findall(r'Self::\w+ => "(\w+)"', source))
    assert len(kinds) >= 16
    ours = {value for name, value in vars(Kind).items() if name.isupper()}
    assert kinds <= ours
    for kind in kinds:
        assert f"| `{kind}` |" in markdown, kind
