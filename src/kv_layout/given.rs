//! The chunk as the connector gives it, which knows its engine's tensors: `--kv-layout layout.json`.
//!
//! Either the fields of a layout,
//! `{"model": "m", "dtype": "bfloat16", "layers": 32, "kv_heads": 8, "head_size": 128, "kv_planes": 2,
//! "chunk_tokens": 256, "tp_rank": 0, "tp_size": 1}`, with the KV heads of this rank; or, where only the connector
//! knows what the bytes mean, `{"model": "m", "chunk_bytes": 33554432, "chunk_tokens": 256}`.
//!
//! `engine` is an object of texts that both sides must have alike and that mean nothing here: the engine's version, its
//! attention backend. A handshake that finds them different names both values.
//!
//! A hybrid model has `groups`: a list of objects with a `name` and the fields of that group's layers (or its
//! `chunk_bytes`); what a group leaves out is taken from the top.
//! `{"model": "m", "dtype": "bfloat16", "kv_heads": 8, "head_size": 128, "kv_planes": 2, "chunk_tokens": 256, "groups":
//! [{"name": "full", "layers": 8}, {"name": "sliding", "layers": 24}]}`. A group with `"whole": true` has no short chunks:
//! its last one is as long as all others.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::dtype::parse_dtype;
use super::model::{parse_object, shown};
use super::{DTYPES_ACCEPTED, KvGroup, KvLayout, LayoutError, OPAQUE_DTYPE};

/// What a layout that leaves it out gets, and what one that does not must agree with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GivenDefaults {
    /// The model's name, where the configuration gives one.
    pub model_name: Option<String>,
    /// Tokens in a whole chunk, where the configuration gives them.
    pub chunk_tokens: Option<u32>,
    /// Tokens in a whole chunk where neither gives them.
    pub chunk_tokens_default: u32,
    /// Tensor-parallel rank.
    pub tp_rank: u32,
    /// Number of ranks; none where the command line did not say.
    pub tp_size: Option<u32>,
}

const FIELDS: &[&str] = &[
    "model",
    "dtype",
    "dtype_bytes",
    "layers",
    "kv_heads",
    "head_size",
    "kv_planes",
    "chunk_tokens",
    "tp_rank",
    "tp_size",
    "chunk_bytes",
    "groups",
    "engine",
];
/// Fields that a group has, besides its name and what it takes from the top.
const GROUP_FIELDS: &[&str] =
    &["name", "dtype", "dtype_bytes", "layers", "kv_heads", "head_size", "kv_planes", "chunk_bytes", "whole"];
/// Fields that an opaque layout cannot have besides `chunk_bytes`.
const SHAPE_FIELDS: &[&str] = &["dtype_bytes", "layers", "kv_heads", "head_size", "kv_planes"];

/// The layout that a connector wrote.
///
/// # Errors
/// [`LayoutError`] naming the field that is missing, unknown, out of range, or contradicts another or the options.
pub fn from_layout_json(json: &str, defaults: &GivenDefaults) -> Result<KvLayout, LayoutError> {
    let fields = parse_object(
        json,
        "expected a layout, for example {\"model\": \"m\", \"chunk_bytes\": 33554432, \"chunk_tokens\": 256}",
    )?;
    refuse_unknown(&fields, FIELDS)?;
    let given = Given { fields: &fields };
    let model = agree("model", given.text("model")?, "--model-name or model_name", defaults.model_name.clone())?
        .ok_or(LayoutError::Missing {
            field: "model",
            accepted: "the model's name, the same at both ends; --model-name gives it as well",
        })?;
    let chunk_tokens = agree("chunk_tokens", given.count("chunk_tokens")?, "chunk_size", defaults.chunk_tokens)?
        .unwrap_or(defaults.chunk_tokens_default);
    // A rank of 0 is also what --rank is when it was not given.
    let rank_option = (defaults.tp_rank != 0).then_some(defaults.tp_rank);
    let tp_rank = agree("tp_rank", given.number("tp_rank")?, "--rank", rank_option)?.unwrap_or(0);
    let tp_size = agree("tp_size", given.count("tp_size")?, "--tp-size", defaults.tp_size)?.unwrap_or(1);

    let groups = match given.value("groups") {
        None => vec![group(String::new(), &given, chunk_tokens)?],
        Some(groups) => named_groups(groups, &fields, chunk_tokens)?,
    };
    let layout = KvLayout { model, chunk_tokens, tp_rank, tp_size, groups, engine: engine(&given)? };
    layout.check()?;
    agree("chunk_bytes", given.bytes("chunk_bytes")?, "the other fields", Some(layout.chunk_bytes()))?;
    Ok(layout)
}

/// What the connector has both sides compare.
fn engine(given: &Given<'_>) -> Result<BTreeMap<String, String>, LayoutError> {
    let facts = given.read("engine", "an object of texts", |value| {
        let facts = value.as_object()?.iter();
        facts.map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
    })?;
    Ok(facts.unwrap_or_default())
}

/// The groups of a hybrid model, each over the fields at the top.
fn named_groups(groups: &Value, top: &Map<String, Value>, chunk_tokens: u32) -> Result<Vec<KvGroup>, LayoutError> {
    let bad = |field: String, seen: &Value, accepted: &str| LayoutError::BadField {
        field,
        seen: shown(seen),
        accepted: accepted.to_owned(),
    };
    let list = groups.as_array().filter(|list| !list.is_empty()).ok_or_else(|| {
        bad("groups".to_owned(), groups, "a list of objects, one for each group of layers, each with a `name`")
    })?;
    let mut named: Vec<KvGroup> = Vec::with_capacity(list.len());
    for (index, item) in list.iter().enumerate() {
        let own = item
            .as_object()
            .ok_or_else(|| bad(format!("groups[{index}]"), item, "an object with a `name` and a group's fields"))?;
        refuse_unknown(own, GROUP_FIELDS)?;
        let name = Given { fields: own }
            .text("name")?
            // The name goes into the fields' names and into a list with commas.
            .filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-'))
            .filter(|name| named.iter().all(|group| group.name != *name))
            .ok_or_else(|| {
                let accepted = "a name of letters, digits, _ and - that no other group has";
                bad(format!("groups[{index}].name"), own.get("name").unwrap_or(&Value::Null), accepted)
            })?;
        // What describes the whole layout is no default for a group.
        let mut fields: Map<String, Value> =
            top.iter().filter(|(field, _)| *field != "chunk_bytes").map(|(k, v)| (k.clone(), v.clone())).collect();
        if own.contains_key("chunk_bytes") && !(Given { fields: own }).has_shape() {
            fields.retain(|field, _| !SHAPE_FIELDS.contains(&field.as_str()));
        }
        fields.extend(own.iter().map(|(k, v)| (k.clone(), v.clone())));
        named.push(group(name, &Given { fields: &fields }, chunk_tokens)?);
    }
    Ok(named)
}

fn group(name: String, given: &Given<'_>, chunk_tokens: u32) -> Result<KvGroup, LayoutError> {
    let chunk_bytes = given.bytes("chunk_bytes")?;
    let mut group = match chunk_bytes {
        Some(chunk_bytes) if !given.has_shape() => opaque_group(name, chunk_bytes, chunk_tokens)?,
        _ => group_of_fields(name, given)?,
    };
    group.whole = given.read("whole", "true or false", Value::as_bool)?.unwrap_or(false);
    agree("chunk_bytes", chunk_bytes, "the other fields", Some(group.partial_bytes(chunk_tokens)))?;
    Ok(group)
}

fn refuse_unknown(fields: &Map<String, Value>, known: &'static [&'static str]) -> Result<(), LayoutError> {
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(unknown) => Err(LayoutError::UnknownField {
            field: unknown.clone(),
            nearest: nearest(unknown, known),
            known: known.join(", "),
        }),
    }
}

fn opaque_group(name: String, chunk_bytes: u64, chunk_tokens: u32) -> Result<KvGroup, LayoutError> {
    let token_bytes = chunk_bytes.checked_div(u64::from(chunk_tokens)).unwrap_or(0);
    let whole = chunk_tokens != 0 && chunk_bytes.is_multiple_of(u64::from(chunk_tokens));
    match u32::try_from(token_bytes) {
        Ok(head_size) if whole => Ok(KvGroup {
            name,
            dtype: OPAQUE_DTYPE.to_owned(),
            dtype_bytes: 1,
            layers: 1,
            kv_heads: 1,
            head_size,
            kv_planes: 1,
            whole: false,
        }),
        _ => Err(LayoutError::Conflict {
            first: format!("chunk_bytes = {chunk_bytes}"),
            second: format!("chunk_tokens = {chunk_tokens}"),
            advice: "every token has the same number of bytes, below 4 GiB, so the second must divide the first",
        }),
    }
}

fn group_of_fields(name: String, given: &Given<'_>) -> Result<KvGroup, LayoutError> {
    let required = |field| {
        given.count(field)?.ok_or(LayoutError::Missing {
                field,
                accepted: "a whole number from 1 up (or give chunk_bytes alone, where only the connector knows what the bytes mean)",
            })
    };
    let dtype = given.text("dtype")?.ok_or(LayoutError::Missing { field: "dtype", accepted: DTYPES_ACCEPTED })?;
    let (dtype, dtype_bytes) = match (parse_dtype(&dtype), given.count("dtype_bytes")?) {
        (Some((name, known_bytes)), given_bytes) => {
            agree("dtype_bytes", given_bytes, name, Some(known_bytes))?;
            (name.to_owned(), known_bytes)
        }
        (None, Some(bytes)) if dtype != OPAQUE_DTYPE => (dtype, bytes),
        (None, _) => {
            return Err(LayoutError::BadField {
                field: "dtype".to_owned(),
                seen: format!("{dtype:?}"),
                accepted: format!("{DTYPES_ACCEPTED}; or another with its dtype_bytes"),
            });
        }
    };
    Ok(KvGroup {
        name,
        dtype,
        dtype_bytes,
        layers: required("layers")?,
        kv_heads: required("kv_heads")?,
        head_size: required("head_size")?,
        kv_planes: required("kv_planes")?,
        whole: false,
    })
}

/// Fields of the layout with their types checked; null counts as absent.
struct Given<'a> {
    fields: &'a Map<String, Value>,
}

impl Given<'_> {
    fn value(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    fn has_shape(&self) -> bool {
        SHAPE_FIELDS.iter().any(|field| self.value(field).is_some())
    }

    fn text(&self, field: &str) -> Result<Option<String>, LayoutError> {
        self.read(field, "text that is not empty", |value| {
            value.as_str().filter(|text| !text.is_empty()).map(str::to_owned)
        })
    }

    fn bytes(&self, field: &str) -> Result<Option<u64>, LayoutError> {
        self.read(field, "a whole number of bytes from 1 up", |value| value.as_u64().filter(|bytes| *bytes > 0))
    }

    fn number(&self, field: &str) -> Result<Option<u32>, LayoutError> {
        self.read(field, "a whole number from 0 to 4294967295", |value| {
            value.as_u64().and_then(|number| u32::try_from(number).ok())
        })
    }

    fn count(&self, field: &str) -> Result<Option<u32>, LayoutError> {
        self.read(field, "a whole number from 1 to 4294967295", |value| {
            value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0)
        })
    }

    fn read<T>(
        &self,
        field: &str,
        accepted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, LayoutError> {
        self.value(field)
            .map(|value| {
                read(value).ok_or_else(|| LayoutError::BadField {
                    field: field.to_owned(),
                    seen: shown(value),
                    accepted: accepted.to_owned(),
                })
            })
            .transpose()
    }
}

/// The value that one or both of two sources give.
fn agree<T: PartialEq + std::fmt::Display>(
    field: &str,
    in_layout: Option<T>,
    source: &str,
    elsewhere: Option<T>,
) -> Result<Option<T>, LayoutError> {
    match (in_layout, elsewhere) {
        (Some(ours), Some(theirs)) if ours != theirs => Err(LayoutError::Conflict {
            first: format!("{field} = {ours}"),
            second: format!("{theirs} from {source}"),
            advice: "leave one of them out, or make them equal",
        }),
        (ours, theirs) => Ok(ours.or(theirs)),
    }
}

fn nearest(unknown: &str, known: &[&str]) -> Option<String> {
    known
        .iter()
        .map(|field| (strsim::normalized_damerau_levenshtein(field, unknown), *field))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, field)| (*field).to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::llama3_8b;
    use super::*;

    fn defaults() -> GivenDefaults {
        GivenDefaults { model_name: None, chunk_tokens: None, chunk_tokens_default: 256, tp_rank: 0, tp_size: None }
    }

    fn layout(json: &Value) -> Result<KvLayout, LayoutError> {
        from_layout_json(&json.to_string(), &defaults())
    }

    fn fields() -> Value {
        json!({
            "model": "meta-llama/Meta-Llama-3-8B", "dtype": "torch.bfloat16", "layers": 32, "kv_heads": 8,
            "head_size": 128, "kv_planes": 2
        })
    }

    #[test]
    fn the_fields_of_a_layout_are_a_layout() {
        // Broken in production: an engine whose tensors are read directly gets another layout than its config.json.
        assert_eq!(layout(&fields()).unwrap(), llama3_8b());
        let mut ranked = fields();
        ranked["tp_rank"] = json!(3);
        ranked["tp_size"] = json!(4);
        ranked["chunk_tokens"] = json!(16);
        ranked["chunk_bytes"] = json!(16 * 131_072);
        let ranked = layout(&ranked).unwrap();
        assert_eq!((ranked.tp_rank, ranked.tp_size, ranked.chunk_tokens), (3, 4, 16));
    }

    #[test]
    fn opaque_bytes_keep_every_size_exact() {
        // Broken in production: a connector with a layout of its own gets slots of another length than it asked for.
        let layout = layout(&json!({"model": "m", "chunk_bytes": 1_000_192, "chunk_tokens": 64})).unwrap();
        assert!(layout.first_group().is_opaque());
        assert_eq!(layout.chunk_bytes(), 1_000_192);
        assert_eq!(layout.first_group().partial_bytes(3), 3 * 15_628);
        assert_eq!(layout.first_group().wire_dtype(), "uint8");
        assert_eq!(layout.first_group().wire_shape(64), [1, 1, 64, 15_628]);
        assert!(layout.fingerprint().contains(&("format".to_owned(), "opaque".to_owned())));
    }

    #[test]
    fn what_the_engine_is_goes_into_the_fingerprint_and_nowhere_else() {
        // Broken in production: two releases of an engine that lay their blocks out differently exchange them.
        let mut json = json!({"model": "m", "chunk_bytes": 4096, "chunk_tokens": 16});
        let plain = layout(&json).unwrap();
        json["engine"] = json!({"vllm": "0.32.0", "attention": "CPU_ATTN"});
        let given = layout(&json).unwrap();
        assert_eq!(given.chunk_bytes(), plain.chunk_bytes());
        assert!(given.fingerprint().contains(&("engine.vllm".to_owned(), "0.32.0".to_owned())));
        assert_eq!(given.fingerprint().len(), plain.fingerprint().len() + 2);
        for (engine, text) in [
            (json!("0.32.0"), "field `engine` = \"0.32.0\"; expected an object of texts"),
            (json!({"vllm": 32}), "field `engine` = {\"vllm\":32}; expected an object of texts"),
            (json!({"vllm": ""}), "length of a text in `engine` = 0; expected 1 to 256"),
        ] {
            json["engine"] = engine;
            assert_eq!(layout(&json).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn groups_take_from_the_top_what_they_leave_out() {
        // Broken in production: a hybrid model's sliding-window layers are sent with the full layers' length.
        let mut json = fields();
        json["groups"] = json!([
            {"name": "full", "layers": 8},
            {"name": "sliding", "layers": 24, "kv_heads": 2, "dtype": "float8_e4m3fn"},
            {"name": "draft", "chunk_bytes": 256 * 100},
            {"name": "state", "chunk_bytes": 256 * 7, "whole": true},
        ]);
        json.as_object_mut().unwrap().remove("layers");
        let hybrid = layout(&json).unwrap();
        let token_bytes: Vec<u64> = hybrid.groups.iter().map(KvGroup::token_bytes).collect();
        assert_eq!(token_bytes, [2 * 8 * 8 * 128 * 2, 2 * 24 * 2 * 128, 100, 7]);
        assert_eq!(hybrid.groups.iter().map(|group| group.whole).collect::<Vec<_>>(), [false, false, false, true]);
        assert_eq!(hybrid.chunk_bytes(), token_bytes[0] * 256);
        let fingerprint = hybrid.fingerprint();
        for field in [
            ("groups", "full,sliding,draft,state"),
            ("sliding.layers", "24"),
            ("draft.format", "opaque"),
            ("state.chunks", "whole"),
        ] {
            assert!(fingerprint.contains(&(field.0.to_owned(), field.1.to_owned())), "{field:?} in {fingerprint:?}");
        }
        for (groups, text) in [
            (
                json!([]),
                "field `groups` = []; expected a list of objects, one for each group of layers, each with a `name`",
            ),
            (json!([7]), "field `groups[0]` = 7; expected an object with a `name` and a group's fields"),
            (
                json!([{"name": "a", "layers": 1}, {"name": "a", "layers": 2}]),
                "field `groups[1].name` = \"a\"; expected a name of letters, digits, _ and - that no other group has",
            ),
            (
                json!([{"name": "a", "layer": 1}]),
                "field `layer` is not a field of a layout; did you mean `layers`?; the fields are name, dtype, dtype_bytes, layers, kv_heads, head_size, kv_planes, chunk_bytes, whole",
            ),
            (
                json!([{"name": "a", "layers": 1, "chunk_bytes": 5}]),
                "chunk_bytes = 5 contradicts 1048576 from the other fields; leave one of them out, or make them equal",
            ),
        ] {
            json["groups"] = groups;
            assert_eq!(layout(&json).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn options_fill_in_what_the_layout_leaves_out_and_must_agree_with_the_rest() {
        // Broken in production: rank 2's daemon announces itself as rank 0, and its peers refuse it or pair wrongly.
        let options = GivenDefaults {
            model_name: Some("named".to_owned()),
            chunk_tokens: Some(128),
            tp_rank: 2,
            tp_size: Some(4),
            ..defaults()
        };
        let unnamed = json!({"chunk_bytes": 1280});
        let layout = from_layout_json(&unnamed.to_string(), &options).unwrap();
        assert_eq!((layout.model.as_str(), layout.chunk_tokens, layout.tp_rank, layout.tp_size), ("named", 128, 2, 4));
        for (field, value, text) in [
            (
                "model",
                json!("x"),
                "model = x contradicts named from --model-name or model_name; leave one of them out, or make them equal",
            ),
            (
                "chunk_tokens",
                json!(256),
                "chunk_tokens = 256 contradicts 128 from chunk_size; leave one of them out, or make them equal",
            ),
            ("tp_rank", json!(1), "tp_rank = 1 contradicts 2 from --rank; leave one of them out, or make them equal"),
            (
                "tp_size",
                json!(8),
                "tp_size = 8 contradicts 4 from --tp-size; leave one of them out, or make them equal",
            ),
        ] {
            let mut json = unnamed.clone();
            json[field] = value;
            assert_eq!(from_layout_json(&json.to_string(), &options).unwrap_err().to_string(), text);
        }
    }

    #[test]
    fn bad_layouts_are_refused_by_naming_the_field() {
        // Broken in production: a mistyped field is ignored and the daemon cuts its buffer wrongly.
        let with = |field: &str, value: Value| {
            let mut json = fields();
            json[field] = value;
            json
        };
        let cases = [
            (
                with("head_sise", json!(1)),
                "field `head_sise` is not a field of a layout; did you mean `head_size`?; the fields are model, dtype, dtype_bytes, layers, kv_heads, head_size, kv_planes, chunk_tokens, tp_rank, tp_size, chunk_bytes, groups, engine",
            ),
            (
                json!({"model": "m"}),
                "field `dtype` is missing; expected bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8",
            ),
            (
                json!({"model": "m", "dtype": "int8"}),
                "field `layers` is missing; expected a whole number from 1 up (or give chunk_bytes alone, where only the connector knows what the bytes mean)",
            ),
            (
                json!({"chunk_bytes": 256}),
                "field `model` is missing; expected the model's name, the same at both ends; --model-name gives it as well",
            ),
            (
                json!({"model": "m", "chunk_bytes": 257}),
                "chunk_bytes = 257 contradicts chunk_tokens = 256; every token has the same number of bytes, below 4 GiB, so the second must divide the first",
            ),
            (
                json!({"model": "m", "chunk_bytes": 0}),
                "field `chunk_bytes` = 0; expected a whole number of bytes from 1 up",
            ),
            (
                with("chunk_bytes", json!(33_554_433)),
                "chunk_bytes = 33554433 contradicts 33554432 from the other fields; leave one of them out, or make them equal",
            ),
            (
                with("dtype_bytes", json!(4)),
                "dtype_bytes = 4 contradicts 2 from bfloat16; leave one of them out, or make them equal",
            ),
            (
                with("dtype", json!("opaque")),
                "field `dtype` = \"opaque\"; expected bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8; or another with its dtype_bytes",
            ),
            (with("layers", json!(1.5)), "field `layers` = 1.5; expected a whole number from 1 to 4294967295"),
            (with("tp_rank", json!(1)), "rank 1 of 1; expected 0 to 0; give --tp-size as well as --rank"),
            (with("chunk_tokens", json!(u32::MAX)), "chunk_tokens = 4294967295; expected 1 to 1048576"),
        ];
        for (json, text) in cases {
            assert_eq!(layout(&json).unwrap_err().to_string(), text);
        }
    }
}
