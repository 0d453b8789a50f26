//! The chunk of a model, from the `config.json` that model hubs keep beside its weights.
//!
//! Grouped-query attention (Llama, Qwen, Mistral, Gemma and most others): every layer keeps keys and values of
//! `num_key_value_heads` heads of `head_dim` elements; `head_dim` is `hidden_size / num_attention_heads` where it is
//! not given. Multi-head latent attention (DeepSeek V2 and V3): every layer keeps one vector of `kv_lora_rank +
//! qk_rope_head_dim` elements, the same on every rank. Models for which neither holds are refused.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{DTYPES_ACCEPTED, KvGroup, KvLayout, LayoutError, parse_dtype};

/// What a model's `config.json` does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelOptions {
    /// The model's name; none: what the file says (`_name_or_path`, or else `model_type`).
    pub model_name: Option<String>,
    /// Element type of the KV cache; none: that of the weights.
    pub kv_dtype: Option<String>,
    /// Tokens in a whole chunk.
    pub chunk_tokens: u32,
    /// Tensor-parallel rank.
    pub tp_rank: u32,
    /// Number of ranks.
    pub tp_size: u32,
}

/// Fields of models that keep another cache than the same one in every layer, and what they mean. `null`, `false`,
/// 0 and empty lists do not count.
const NOT_UNIFORM: &[(&str, &str)] = &[
    ("is_encoder_decoder", "the decoder keeps a cross-attention cache as well"),
    ("cross_attention_layers", "some layers attend to another input"),
    ("num_kv_shared_layers", "some layers share their cache"),
    ("index_head_dim", "the sparse-attention indexer keeps a cache of its own"),
    ("layers_block_type", "some layers keep no KV cache"),
    ("attn_layer_period", "some layers keep no KV cache"),
    ("attn_layer_indices", "some layers keep no KV cache"),
    ("hybrid_override_pattern", "some layers keep no KV cache"),
    ("full_attention_interval", "some layers keep no KV cache"),
    ("linear_num_key_heads", "some layers keep no KV cache"),
    ("block_configs", "layers have different numbers of heads"),
    ("global_head_dim", "layers have heads of different sizes"),
    ("multi_query", "the number of KV heads depends on the version of the architecture"),
];

/// Kinds of layers, in `layer_types`, whose KV cache has the shape that this module computes.
const UNIFORM_LAYER_TYPES: &[&str] =
    &["full_attention", "sliding_attention", "chunked_attention", "global_attention", "attention"];

/// The layout of a model's chunk.
///
/// # Errors
/// [`LayoutError`] naming the field that is missing, cannot be used, or says that the model is of another kind.
pub fn from_model_config(json: &str, options: &ModelOptions) -> Result<KvLayout, LayoutError> {
    let fields = parse_object(json, "expected a model hub's config.json")?;
    // A multimodal model keeps its language model's numbers in `text_config`, all of them or only some.
    let model = ModelFields { text: fields.get("text_config").and_then(Value::as_object), whole: &fields };

    model.refuse_other_kinds()?;
    let (dtype, dtype_bytes) = model.dtype(options.kv_dtype.as_deref())?;
    let layers = model.count(&["num_hidden_layers", "n_layer", "num_layers"])?;
    let (kv_planes, kv_heads, head_size) = match model.optional_count(&["kv_lora_rank"])? {
        Some(rank) => {
            let rope = model.count(&["qk_rope_head_dim"])?;
            (1, 1, rank.checked_add(rope).ok_or_else(|| too_large("kv_lora_rank", rank))?)
        }
        None => {
            let (kv_heads, head_size) = model.grouped_heads()?;
            (2, heads_of_rank(kv_heads, options.tp_size)?, head_size)
        }
    };
    let layout = KvLayout {
        model: model.name(options.model_name.as_deref())?,
        chunk_tokens: options.chunk_tokens,
        tp_rank: options.tp_rank,
        tp_size: options.tp_size,
        groups: vec![KvGroup {
            name: String::new(),
            dtype: dtype.to_owned(),
            dtype_bytes,
            layers,
            kv_heads,
            head_size,
            kv_planes,
            whole: false,
        }],
        engine: BTreeMap::new(),
    };
    layout.check()?;
    Ok(layout)
}

/// KV heads of one rank: an equal share, or one copy each where there are more ranks than heads.
fn heads_of_rank(kv_heads: u32, tp_size: u32) -> Result<u32, LayoutError> {
    if tp_size == 0 {
        return Err(LayoutError::Rank { tp_rank: 0, tp_size });
    }
    if kv_heads.is_multiple_of(tp_size) {
        Ok(kv_heads / tp_size)
    } else if tp_size.is_multiple_of(kv_heads) {
        Ok(1)
    } else {
        Err(LayoutError::NotDivisible { kv_heads: kv_heads.into(), tp_size })
    }
}

pub(super) fn parse_object(json: &str, expected: &'static str) -> Result<Map<String, Value>, LayoutError> {
    let not_json = |reason| LayoutError::NotJson { reason, expected };
    match serde_json::from_str(json) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(not_json("it holds another kind of value".to_owned())),
        Err(error) => Err(not_json(error.to_string())),
    }
}

/// A value as an error text shows it: long ones cut.
pub(super) fn shown(value: &Value) -> String {
    const SHOWN_CHARS_MAX: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn too_large(field: &str, seen: u32) -> LayoutError {
    LayoutError::BadField {
        field: field.to_owned(),
        seen: seen.to_string(),
        accepted: "a number below 1000000".to_owned(),
    }
}

/// The fields of a config.json, those of its `text_config` first.
struct ModelFields<'a> {
    text: Option<&'a Map<String, Value>>,
    whole: &'a Map<String, Value>,
}

impl<'a> ModelFields<'a> {
    /// The value of a field; `null` counts as absent, as it does for the libraries that write these files.
    fn value(&self, field: &str) -> Option<&'a Value> {
        let find = |fields: &'a Map<String, Value>| fields.get(field).filter(|value| !value.is_null());
        self.text.and_then(find).or_else(|| find(self.whole))
    }

    /// The first of several names under which the same number is known; 0 counts as absent only where `zero` says so.
    fn optional_count(&self, names: &[&'static str]) -> Result<Option<u32>, LayoutError> {
        let Some((name, value)) = names.iter().find_map(|name| self.value(name).map(|value| (*name, value))) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|number| u32::try_from(number).ok()) {
            Some(number) if number > 0 => Ok(Some(number)),
            _ => Err(LayoutError::BadField {
                field: name.to_owned(),
                seen: shown(value),
                accepted: "a whole number from 1 to 4294967295".to_owned(),
            }),
        }
    }

    fn count(&self, names: &[&'static str]) -> Result<u32, LayoutError> {
        self.optional_count(names)?.ok_or(LayoutError::Missing {
            field: names.first().copied().unwrap_or_default(),
            accepted: "a whole number from 1 up, as a model hub's config.json has it at the top or in text_config",
        })
    }

    fn grouped_heads(&self) -> Result<(u32, u32), LayoutError> {
        const HEADS: &[&str] = &["num_attention_heads", "n_head"];
        // Without num_key_value_heads every attention head has keys and values of its own.
        let kv_heads = match self.optional_count(&["num_key_value_heads", "num_kv_heads"])? {
            Some(kv_heads) => kv_heads,
            None => self.count(HEADS)?,
        };
        let head_size = match self.optional_count(&["head_dim"])? {
            Some(head_size) => head_size,
            None => {
                let hidden = self.count(&["hidden_size", "n_embd"])?;
                let heads = self.count(HEADS)?;
                if !hidden.is_multiple_of(heads) {
                    return Err(LayoutError::Conflict {
                        first: format!("hidden_size = {hidden}"),
                        second: format!("num_attention_heads = {heads}"),
                        advice: "the second must divide the first where head_dim is not given",
                    });
                }
                hidden / heads
            }
        };
        if let Some(value_size) = self.optional_count(&["v_head_dim"])?
            && value_size != head_size
        {
            return Err(LayoutError::NotUniform {
                field: "v_head_dim".to_owned(),
                seen: value_size.to_string(),
                reason: "keys and values have different sizes",
            });
        }
        Ok((kv_heads, head_size))
    }

    fn dtype(&self, kv_dtype: Option<&str>) -> Result<(&'static str, u32), LayoutError> {
        let bad = |field: &str, seen: String| LayoutError::BadField {
            field: field.to_owned(),
            seen,
            accepted: DTYPES_ACCEPTED.to_owned(),
        };
        if let Some(text) = kv_dtype {
            return parse_dtype(text).ok_or_else(|| bad("kv_cache_dtype", text.to_owned()));
        }
        // Newer versions of transformers write `dtype`; a file has one of the two.
        for field in ["torch_dtype", "dtype"] {
            if let Some(value) = self.value(field) {
                return value.as_str().and_then(parse_dtype).ok_or_else(|| bad(field, shown(value)));
            }
        }
        Err(LayoutError::Missing { field: "torch_dtype (or dtype)", accepted: DTYPES_ACCEPTED })
    }

    fn name(&self, given: Option<&str>) -> Result<String, LayoutError> {
        if let Some(name) = given {
            return Ok(name.to_owned());
        }
        let text = |field| self.whole.get(field).and_then(Value::as_str).filter(|text| !text.is_empty());
        // A path says where the file was on the machine that wrote it, not which model it is.
        text("_name_or_path")
            .filter(|name| !name.starts_with(['/', '.', '~']))
            .or_else(|| text("model_type"))
            .map(str::to_owned)
            .ok_or(LayoutError::Missing {
                field: "_name_or_path (or model_type)",
                accepted: "the model's name, the same at both ends; --model-name gives it as well",
            })
    }

    fn refuse_other_kinds(&self) -> Result<(), LayoutError> {
        for (field, reason) in NOT_UNIFORM {
            let Some(value) = self.value(field) else {
                continue;
            };
            let nothing = match value {
                Value::Bool(set) => !set,
                Value::Number(number) => number.as_f64() == Some(0.0),
                Value::Array(items) => items.is_empty(),
                Value::String(text) => text.is_empty(),
                Value::Null | Value::Object(_) => false,
            };
            if !nothing {
                return Err(LayoutError::NotUniform { field: (*field).to_owned(), seen: shown(value), reason });
            }
        }
        let kinds = self.value("layer_types").and_then(Value::as_array);
        let other = kinds
            .into_iter()
            .flatten()
            .find(|kind| !kind.as_str().is_some_and(|kind| UNIFORM_LAYER_TYPES.contains(&kind)));
        match other {
            Some(kind) => Err(LayoutError::NotUniform {
                field: "layer_types".to_owned(),
                seen: shown(kind),
                reason: "such layers do not keep an ordinary KV cache",
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn options() -> ModelOptions {
        ModelOptions { model_name: None, kv_dtype: None, chunk_tokens: 256, tp_rank: 0, tp_size: 1 }
    }

    fn layout(config: &Value, options: &ModelOptions) -> Result<KvLayout, LayoutError> {
        from_model_config(&config.to_string(), options)
    }

    fn llama() -> Value {
        json!({
            "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "hidden_size": 4096, "torch_dtype": "bfloat16"
        })
    }

    fn with(mut config: Value, field: &str, value: Value) -> Value {
        config[field] = value;
        config
    }

    fn without(mut config: Value, field: &str) -> Value {
        config.as_object_mut().unwrap().remove(field);
        config
    }

    #[test]
    fn grouped_heads_of_llama_and_a_head_dim_of_its_own() {
        // Broken in production: the chunk of the commonest models has the wrong size.
        let llama_layout = layout(&llama(), &options()).unwrap();
        assert_eq!(
            (
                llama_layout.first_group().layers,
                llama_layout.first_group().kv_heads,
                llama_layout.first_group().head_size,
                llama_layout.first_group().kv_planes
            ),
            (32, 8, 128, 2)
        );
        assert_eq!(llama_layout.chunk_bytes(), 33_554_432);
        assert_eq!(llama_layout.model, "llama");
        let gemma = layout(&with(llama(), "head_dim", json!(256)), &options()).unwrap();
        assert_eq!(gemma.first_group().head_size, 256);
        // null is how an absent head_dim is often written.
        let null = layout(&with(llama(), "head_dim", Value::Null), &options()).unwrap();
        assert_eq!(null.first_group().head_size, 128);
    }

    #[test]
    fn no_kv_heads_means_as_many_as_attention_heads() {
        // Broken in production: multi-head attention models get an eighth of their cache.
        let config = without(llama(), "num_key_value_heads");
        assert_eq!(layout(&config, &options()).unwrap().first_group().kv_heads, 32);
        let gpt2 = json!({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "dtype": "float32"});
        assert_eq!(layout(&gpt2, &options()).unwrap().first_group().token_bytes(), 2 * 12 * 768 * 4);
    }

    #[test]
    fn latent_attention_is_one_plane_of_one_vector_on_every_rank() {
        // Broken in production: DeepSeek's cache is taken for one with keys and values, 50 times too large.
        let deepseek = json!({
            "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128,
            "num_key_value_heads": 128, "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "torch_dtype": "bfloat16"
        });
        for tp_size in [1, 8, 3] {
            let layout = layout(&deepseek, &ModelOptions { tp_size, ..options() }).unwrap();
            assert_eq!(
                (layout.first_group().kv_planes, layout.first_group().kv_heads, layout.first_group().head_size),
                (1, 1, 576)
            );
            assert_eq!(layout.chunk_bytes(), 61 * 576 * 2 * 256);
            assert_eq!(layout.first_group().wire_shape(256), [1, 61, 256, 576]);
            assert_eq!(layout.first_group().wire_format(), 6);
        }
        let error = layout(&without(deepseek, "qk_rope_head_dim"), &options()).unwrap_err();
        assert!(error.to_string().starts_with("field `qk_rope_head_dim` is missing; expected"), "{error}");
    }

    #[test]
    fn nested_text_config_of_a_multimodal_model() {
        // Broken in production: the vision tower's numbers, or none, are taken for the language model's.
        let nested = json!({
            "model_type": "mllama", "torch_dtype": "bfloat16", "hidden_size": 1, "vision_config": {"hidden_size": 2},
            "text_config": {"num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
                "hidden_size": 2560, "head_dim": 256}
        });
        let layout = layout(&nested, &options()).unwrap();
        assert_eq!(
            (layout.first_group().layers, layout.first_group().kv_heads, layout.first_group().head_size),
            (34, 4, 256)
        );
    }

    #[test]
    fn heads_are_divided_replicated_or_refused() {
        // Broken in production: a rank's slot is cut for heads that it does not have.
        let heads =
            |tp_size| layout(&llama(), &ModelOptions { tp_size, ..options() }).map(|l| l.first_group().kv_heads);
        assert_eq!(heads(1), Ok(8));
        assert_eq!(heads(4), Ok(2));
        assert_eq!(heads(8), Ok(1));
        assert_eq!(heads(16), Ok(1));
        assert_eq!(
            heads(3).unwrap_err().to_string(),
            "8 KV heads cannot be split over 3 tensor-parallel ranks; expected --tp-size to divide 8, or to be a multiple of it"
        );
        assert!(heads(0).is_err());
    }

    #[test]
    fn the_dtype_is_found_under_both_names_and_can_be_overridden() {
        // Broken in production: files of newer transformers are refused, or an fp8 cache gets slots twice its size.
        let newer = with(without(llama(), "torch_dtype"), "dtype", json!("float16"));
        assert_eq!(layout(&newer, &options()).unwrap().first_group().dtype, "float16");
        let fp8 = ModelOptions { kv_dtype: Some("fp8".to_owned()), ..options() };
        let fp8 = layout(&llama(), &fp8).unwrap();
        assert_eq!(
            (fp8.first_group().dtype.as_str(), fp8.first_group().dtype_bytes, fp8.first_group().wire_dtype()),
            ("float8_e4m3fn", 1, "uint8")
        );
    }

    #[test]
    fn a_path_is_not_a_name() {
        // Broken in production: two hosts with the model in different folders refuse each other.
        let name = |path: &str| layout(&with(llama(), "_name_or_path", json!(path)), &options()).unwrap().model;
        assert_eq!(name("meta-llama/Meta-Llama-3-8B"), "meta-llama/Meta-Llama-3-8B");
        assert_eq!(name("/models/llama"), "llama");
        assert_eq!(name("./llama"), "llama");
        assert_eq!(name(""), "llama");
    }

    #[test]
    fn bad_files_are_refused_by_naming_the_field() {
        // Broken in production: an operator sees a chunk of a nonsensical size, or a panic, instead of the field.
        let cases = [
            (json!([]), "not a JSON object: it holds another kind of value; expected a model hub's config.json"),
            (
                without(llama(), "num_hidden_layers"),
                "field `num_hidden_layers` is missing; expected a whole number from 1 up, as a model hub's config.json has it at the top or in text_config",
            ),
            (
                with(llama(), "num_hidden_layers", json!(0)),
                "field `num_hidden_layers` = 0; expected a whole number from 1 to 4294967295",
            ),
            (
                with(llama(), "num_hidden_layers", json!("32")),
                "field `num_hidden_layers` = \"32\"; expected a whole number from 1 to 4294967295",
            ),
            (
                with(llama(), "num_key_value_heads", json!(-8)),
                "field `num_key_value_heads` = -8; expected a whole number from 1 to 4294967295",
            ),
            (with(llama(), "num_hidden_layers", json!(5000)), "layers = 5000; expected 1 to 4096"),
            (
                with(llama(), "hidden_size", json!(4097)),
                "hidden_size = 4097 contradicts num_attention_heads = 32; the second must divide the first where head_dim is not given",
            ),
            (
                with(llama(), "torch_dtype", json!("float64")),
                "field `torch_dtype` = \"float64\"; expected bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8",
            ),
            (
                without(llama(), "torch_dtype"),
                "field `torch_dtype (or dtype)` is missing; expected bfloat16, float16, float32, float8_e4m3fn, float8_e5m2, uint8 or int8",
            ),
            (
                without(llama(), "model_type"),
                "field `_name_or_path (or model_type)` is missing; expected the model's name, the same at both ends; --model-name gives it as well",
            ),
            (
                with(llama(), "layer_types", json!(["full_attention", "linear_attention"])),
                "field `layer_types` = \"linear_attention\": such layers do not keep an ordinary KV cache, so its chunk does not follow from config.json; give the layout with --kv-layout",
            ),
            (
                with(llama(), "num_kv_shared_layers", json!(10)),
                "field `num_kv_shared_layers` = 10: some layers share their cache, so its chunk does not follow from config.json; give the layout with --kv-layout",
            ),
        ];
        for (config, text) in cases {
            assert_eq!(layout(&config, &options()).unwrap_err().to_string(), text);
        }
        let broken = from_model_config("{", &options()).unwrap_err().to_string();
        assert!(broken.starts_with("not a JSON object: EOF while parsing"), "{broken}");
    }
}
