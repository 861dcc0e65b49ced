//! `[model]` of a job file: its keys and their defaults, for each architecture.
//!
//! A preset gives every key a default; other keys override it. A key of another architecture is refused and told apart
//! from a misspelt one: it would say something about the model that nobody hears.

use super::model::{EPSILON, POSITIONS, ROPE_THETA};
use super::reader::{POSITIVE, Reader, SpecError};
use super::{Architecture, ModelSpec, PRESETS};

/// The keys that only some architectures have.
struct Own {
    kv_heads: Option<usize>,
    head_dim: Option<usize>,
    rope_theta: Option<f64>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    layer_norm_epsilon: Option<f64>,
}

pub(super) fn model(mut r: Reader) -> Result<ModelSpec, SpecError> {
    let (base, architecture) = base(&mut r)?;
    let mut size = |key: &'static str, of: fn(&ModelSpec) -> usize| {
        Ok(r.whole_if(key, 1)?.map(|value| value as usize).or_else(|| base.as_ref().map(of)))
    };
    let hidden_size = size("hidden_size", |m| m.hidden_size)?;
    let num_hidden_layers = size("num_hidden_layers", |m| m.num_hidden_layers)?;
    let num_attention_heads = size("num_attention_heads", |m| m.num_attention_heads)?;
    let intermediate_size = size("intermediate_size", |m| m.intermediate_size)?;
    let vocab_size = size("vocab_size", |m| m.vocab_size)?;
    let tied = base.as_ref().map_or(architecture == Architecture::Gpt2, |m| m.tie_word_embeddings);
    let tie_word_embeddings = r.boolean("tie_word_embeddings", tied)?;
    let own = match architecture {
        Architecture::Llama => llama(&mut r, base.as_ref())?,
        Architecture::Gpt2 => gpt2(&mut r, base.as_ref())?,
    };
    let initializer_range = r.number("initializer_range", (0.0, 10.0), 0.02)?;
    r.finish()?;
    let given = |key: &str, value: Option<usize>| {
        value.ok_or_else(|| r.missing(key, "a whole number of at least 1, or give model.preset"))
    };
    let hidden_size = given("hidden_size", hidden_size)?;
    let num_attention_heads = given("num_attention_heads", num_attention_heads)?;
    let kv_default = match (architecture, &base) {
        (Architecture::Llama, Some(base)) => base.num_key_value_heads.min(num_attention_heads),
        _ => num_attention_heads,
    };
    let intermediate_size = match architecture {
        Architecture::Gpt2 => intermediate_size.unwrap_or(hidden_size.saturating_mul(4)),
        Architecture::Llama => given("intermediate_size", intermediate_size)?,
    };
    let head_dim = match own.head_dim {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => {
            let other = if architecture == Architecture::Llama { " (or give model.head_dim)" } else { "" };
            let wanted = format!("a divisor of model.hidden_size = {hidden_size}{other}");
            return Err(r.refuse("num_attention_heads", num_attention_heads.to_string(), wanted));
        }
    };
    Ok(ModelSpec {
        architecture,
        hidden_size,
        num_hidden_layers: given("num_hidden_layers", num_hidden_layers)?,
        num_attention_heads,
        num_key_value_heads: own.kv_heads.unwrap_or(kv_default),
        head_dim,
        intermediate_size,
        vocab_size: given("vocab_size", vocab_size)?,
        tie_word_embeddings,
        rope_theta: own.rope_theta,
        rms_norm_eps: own.rms_norm_eps,
        initializer_range,
        max_position_embeddings: own.max_position_embeddings,
        layer_norm_epsilon: own.layer_norm_epsilon,
    })
}

/// The preset, and the architecture, which it decides if there is one.
fn base(r: &mut Reader) -> Result<(Option<ModelSpec>, Architecture), SpecError> {
    let Some(name) = r.text("preset")? else {
        return Ok((None, r.choice("architecture", &Architecture::ALL, Architecture::Llama)?));
    };
    let Some(base) = ModelSpec::preset(&name) else {
        let known = PRESETS.map(|preset| format!("{preset:?}")).join(", ");
        return Err(r.refuse("preset", format!("{name:?}"), format!("one of {known}")));
    };
    let architecture = r.choice("architecture", &Architecture::ALL, base.architecture)?;
    if architecture != base.architecture {
        let wanted = format!("{:?}, as preset {name:?} is, or left out", base.architecture.name());
        return Err(r.refuse("architecture", format!("{:?}", architecture.name()), wanted));
    }
    Ok((Some(base), architecture))
}

fn llama(r: &mut Reader, base: Option<&ModelSpec>) -> Result<Own, SpecError> {
    foreign(r, Architecture::Gpt2, Architecture::Llama, &["max_position_embeddings", "layer_norm_epsilon"])?;
    let theta = base.and_then(|m| m.rope_theta).unwrap_or(ROPE_THETA);
    Ok(Own {
        kv_heads: r.whole_if("num_key_value_heads", 1)?.map(|heads| heads as usize),
        head_dim: r.whole_if("head_dim", 2)?.map(|width| width as usize),
        rope_theta: Some(r.number("rope_theta", (1.0, POSITIVE.1), theta)?),
        rms_norm_eps: Some(r.number("rms_norm_eps", (POSITIVE.0, 1.0), EPSILON)?),
        max_position_embeddings: None,
        layer_norm_epsilon: None,
    })
}

fn gpt2(r: &mut Reader, base: Option<&ModelSpec>) -> Result<Own, SpecError> {
    let others = ["num_key_value_heads", "head_dim", "rope_theta", "rms_norm_eps"];
    foreign(r, Architecture::Llama, Architecture::Gpt2, &others)?;
    let positions = base.and_then(|m| m.max_position_embeddings).unwrap_or(POSITIONS);
    Ok(Own {
        kv_heads: None,
        head_dim: None,
        rope_theta: None,
        rms_norm_eps: None,
        max_position_embeddings: Some(r.size("max_position_embeddings", positions)?),
        layer_norm_epsilon: Some(r.number("layer_norm_epsilon", (POSITIVE.0, 1.0), EPSILON)?),
    })
}

/// Refuses the keys that another architecture has and this one lacks.
fn foreign(r: &mut Reader, theirs: Architecture, ours: Architecture, keys: &[&'static str]) -> Result<(), SpecError> {
    for key in keys {
        if let Some(value) = r.take(key) {
            return Err(r.wrong(key, &value, not_ours(theirs, ours)));
        }
    }
    Ok(())
}

/// What a key of another architecture must be.
pub(super) fn not_ours(theirs: Architecture, ours: Architecture) -> String {
    format!("left out: it belongs to architecture {:?}, and this model's is {:?}", theirs.name(), ours.name())
}
