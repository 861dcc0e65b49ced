//! From a TOML job file to a [`JobSpec`]: the one place that names every key and its default.

use std::path::Path;

use toml::{Table, Value};

use super::reader::{Reader, SpecError, set_place};
use super::{
    Architecture, BestOrder, CheckpointSpec, DataSpec, DeviceKind, FaultSpec, JobSpec, MOST_SEED, MOST_THREADS,
    ModelSpec, OptimizerKind, OptimizerSpec, Overrides, PRESETS, Reduction, ResourcesSpec, SPEC_FORMAT, ScheduleKind,
    ScheduleSpec, TrainingSpec, VALIDATION_LOSS, Workers,
};
use crate::ids::JobName;

/// Job files are small; a larger one is a mistake.
const MOST_BYTES: u64 = 1 << 20;
/// The bound of keys that are kept in 32 bits.
const MOST_U32: u64 = u32::MAX as u64;

impl JobSpec {
    /// Reads a job file, applies `--set` overrides, fills in defaults and checks the whole.
    ///
    /// Relative paths become absolute, seen from the job file's folder.
    pub fn load(path: &Path, overrides: &Overrides) -> Result<Self, SpecError> {
        let read_error = |source| SpecError::Read { path: path.display().to_string(), source };
        let size = std::fs::metadata(path).map_err(read_error)?.len();
        if size > MOST_BYTES {
            let too_big = std::io::Error::other(format!("{size} bytes is no job file (at most {MOST_BYTES})"));
            return Err(read_error(too_big));
        }
        let text = std::fs::read_to_string(path).map_err(read_error)?;
        let folder = std::path::absolute(path).map_err(read_error)?;
        let folder = folder.parent().unwrap_or(Path::new("/")).to_path_buf();
        Self::parse(&path.display().to_string(), &text, &folder, overrides)
    }

    /// As [`JobSpec::load`], from text; `place` names it in messages.
    pub fn parse(place: &str, text: &str, folder: &Path, overrides: &Overrides) -> Result<Self, SpecError> {
        let mut table: Table =
            text.parse().map_err(|source| SpecError::Syntax { place: place.into(), source: Box::new(source) })?;
        for (key, value) in overrides {
            apply(&mut table, key, value)?;
        }
        Self::build(place, table, folder).map_err(|error| error.blame(overrides))
    }

    fn build(place: &str, table: Table, folder: &Path) -> Result<Self, SpecError> {
        let mut top = Reader::new(place, table);
        let name = top.text("name")?.ok_or_else(|| top.missing("name", "the job's name, such as name = \"tiny\""))?;
        let name = JobName::new(&name)
            .map_err(|error| top.refuse("name", format!("{name:?}"), format!("a usable name: {error}")))?;
        let training = training(top.section("training")?)?;
        let spec = Self {
            format: SPEC_FORMAT,
            name,
            model: model(top.section("model")?)?,
            data: data(top.section("data")?, folder)?,
            optimizer: optimizer(top.section("optimizer")?)?,
            schedule: schedule(top.section("schedule")?, training.steps)?,
            checkpoint: checkpoint(top.section("checkpoint")?, folder)?,
            resources: resources(top.section("resources")?)?,
            fault: fault(top.section("fault")?)?,
            training,
        };
        top.finish()?;
        spec.validate(place)?;
        Ok(spec)
    }
}

/// Puts one `--set section.key=value` into the table. A value that is not TOML is taken as a string.
fn apply(table: &mut Table, key: &str, text: &str) -> Result<(), SpecError> {
    let parsed = format!("v = {text}").parse::<Table>().ok().and_then(|mut t| t.remove("v"));
    let value = parsed.unwrap_or_else(|| Value::String(text.to_string()));
    let mut parts: Vec<&str> = key.split('.').collect();
    let last = parts.pop().unwrap_or_default();
    let mut at = table;
    for part in parts {
        let next = at.entry(part.to_string()).or_insert_with(|| Value::Table(Table::new()));
        at = next.as_table_mut().ok_or_else(|| SpecError::UnknownKey {
            place: set_place(key, text),
            key: key.to_string(),
            hint: format!(" (`{part}` is a value, not a section)"),
        })?;
    }
    at.insert(last.to_string(), value);
    Ok(())
}

fn model(mut r: Reader) -> Result<ModelSpec, SpecError> {
    let base = match r.text("preset")? {
        None => None,
        Some(name) => Some(ModelSpec::preset(&name).ok_or_else(|| {
            r.refuse("preset", format!("{name:?}"), format!("one of {}", PRESETS.map(|p| format!("{p:?}")).join(", ")))
        })?),
    };
    let architecture = r.choice("architecture", &[("llama", Architecture::Llama)], Architecture::Llama)?;
    let base_size = |r: &Reader, key: &str, of: fn(&ModelSpec) -> usize| {
        base.as_ref().map(of).ok_or_else(|| r.missing(key, "a whole number of at least 1, or give model.preset"))
    };
    let mut size = |key: &'static str, of: fn(&ModelSpec) -> usize| match r.whole_if(key, 1)? {
        Some(value) => Ok(value as usize),
        None => base_size(&r, key, of),
    };
    let hidden_size = size("hidden_size", |m| m.hidden_size)?;
    let num_hidden_layers = size("num_hidden_layers", |m| m.num_hidden_layers)?;
    let num_attention_heads = size("num_attention_heads", |m| m.num_attention_heads)?;
    let intermediate_size = size("intermediate_size", |m| m.intermediate_size)?;
    let vocab_size = size("vocab_size", |m| m.vocab_size)?;
    let kv_default = base.as_ref().map_or(num_attention_heads, |m| m.num_key_value_heads.min(num_attention_heads));
    let num_key_value_heads = r.size("num_key_value_heads", kv_default)?;
    let head_dim = match r.whole_if("head_dim", 2)? {
        Some(head_dim) => head_dim as usize,
        None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
        None => {
            let wanted = format!("a divisor of model.hidden_size = {hidden_size} (or give model.head_dim)");
            return Err(r.refuse("num_attention_heads", num_attention_heads.to_string(), wanted));
        }
    };
    let spec = ModelSpec {
        architecture,
        hidden_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        intermediate_size,
        vocab_size,
        tie_word_embeddings: r.boolean("tie_word_embeddings", base.as_ref().is_some_and(|m| m.tie_word_embeddings))?,
        rope_theta: r.number("rope_theta", 1.0, f64::MAX, 10_000.0)?,
        rms_norm_eps: r.number("rms_norm_eps", f64::MIN_POSITIVE, 1.0, 1e-5)?,
        initializer_range: r.number("initializer_range", 0.0, 10.0, 0.02)?,
    };
    r.finish()?;
    Ok(spec)
}

fn data(mut r: Reader, folder: &Path) -> Result<DataSpec, SpecError> {
    let wanted = "the path of an indexed dataset without its .idx ending (make one with `cairn data prepare`)";
    let train = r.text("train")?.ok_or_else(|| r.missing("train", wanted))?;
    let validation = r.text("validation")?;
    r.finish()?;
    let resolve = |text: String| folder.join(text).display().to_string();
    Ok(DataSpec { train: resolve(train), validation: validation.map(resolve) })
}

fn training(mut r: Reader) -> Result<TrainingSpec, SpecError> {
    let spec = TrainingSpec {
        steps: r.whole_if("steps", 1)?.ok_or_else(|| r.missing("steps", "a whole number of at least 1"))?,
        sequence_length: r.size("sequence_length", 256)?,
        global_batch: r.size("global_batch", 16)?,
        micro_batch: r.size("micro_batch", 1)?,
        seed: r.whole_in("seed", 0..=MOST_SEED, 1)?,
        reduction: r.choice(
            "reduction",
            &[("exact", Reduction::Exact), ("fast", Reduction::Fast)],
            Reduction::Exact,
        )?,
        validate_every: r.whole("validate_every", 0, 0)?,
        validate_sequences: r.size("validate_sequences", 64)?,
    };
    r.finish()?;
    Ok(spec)
}

fn optimizer(mut r: Reader) -> Result<OptimizerSpec, SpecError> {
    let kind = r.choice("kind", &[("adamw", OptimizerKind::Adamw)], OptimizerKind::Adamw)?;
    let learning_rate = r.number("learning_rate", f64::MIN_POSITIVE, f64::MAX, 1e-3)?;
    let betas = match r.take("betas") {
        None => [0.9, 0.95],
        Some(Value::Array(items)) if items.len() == 2 => {
            let below_one = 1.0 - f64::EPSILON;
            [r.as_number("betas", &items[0], 0.0, below_one)?, r.as_number("betas", &items[1], 0.0, below_one)?]
        }
        Some(other) => return Err(r.wrong("betas", &other, "a list of two numbers, such as [0.9, 0.95]".into())),
    };
    let spec = OptimizerSpec {
        kind,
        learning_rate,
        betas,
        epsilon: r.number("epsilon", f64::MIN_POSITIVE, f64::MAX, 1e-8)?,
        weight_decay: r.number("weight_decay", 0.0, f64::MAX, 0.1)?,
        no_decay: r.texts("no_decay", &["norm"])?,
        clip_norm: match r.take("clip_norm") {
            None => Some(1.0),
            Some(Value::Boolean(false)) => None,
            Some(value) => Some(r.as_number("clip_norm", &value, f64::MIN_POSITIVE, f64::MAX)?),
        },
    };
    r.finish()?;
    Ok(spec)
}

fn schedule(mut r: Reader, steps: u64) -> Result<ScheduleSpec, SpecError> {
    let kinds = [
        ("cosine", ScheduleKind::Cosine),
        ("linear", ScheduleKind::Linear),
        ("wsd", ScheduleKind::Wsd),
        ("constant", ScheduleKind::Constant),
    ];
    let spec = ScheduleSpec {
        kind: r.choice("kind", &kinds, ScheduleKind::Cosine)?,
        warmup_steps: r.whole("warmup_steps", 0, 0)?,
        decay_steps: r.whole("decay_steps", 1, steps.div_ceil(5))?,
        minimum_ratio: r.number("minimum_ratio", 0.0, 1.0, 0.1)?,
    };
    r.finish()?;
    Ok(spec)
}

fn checkpoint(mut r: Reader, folder: &Path) -> Result<CheckpointSpec, SpecError> {
    let store = r.text("store")?.unwrap_or_else(|| "./cairn-store".into());
    let orders = [("lowest", BestOrder::Lowest), ("highest", BestOrder::Highest)];
    let spec = CheckpointSpec {
        store: if store.contains("://") { store } else { store_path(&folder.join(store)) },
        every_steps: r.whole("every_steps", 1, 100)?,
        keep_last: r.size("keep_last", 3)?,
        keep_every: r.whole("keep_every", 0, 0)?,
        keep_best: r.whole("keep_best", 0, 0)? as usize,
        keep_best_metric: r.text("keep_best_metric")?.unwrap_or_else(|| VALIDATION_LOSS.into()),
        keep_best_order: r.choice("keep_best_order", &orders, BestOrder::Lowest)?,
        keep_within_steps: r.whole("keep_within_steps", 0, 0)?,
    };
    r.finish()?;
    Ok(spec)
}

/// The `file://` URL of a path, its `.` and `..` taken out so that one folder has one name.
pub(super) fn store_path(path: &Path) -> String {
    use std::path::Component;
    let mut clean = std::path::PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    let text = clean.display().to_string();
    format!("file://{}", text.replace('%', "%25").replace(' ', "%20").replace('#', "%23").replace('?', "%3F"))
}

fn resources(mut r: Reader) -> Result<ResourcesSpec, SpecError> {
    let workers = match r.take("workers") {
        None => Workers { min: 1, max: 1 },
        Some(Value::Table(table)) => {
            let mut range = r.within("workers", table);
            let min = range.whole_in("min", 1..=MOST_U32, 1)?;
            let max = range.whole_in("max", min..=MOST_U32, min)?;
            range.finish()?;
            Workers { min: min as u32, max: max as u32 }
        }
        Some(value) => Workers { min: 1, max: r.as_whole("workers", &value, 1..=MOST_U32)? as u32 },
    };
    let devices = [("auto", DeviceKind::Auto), ("cpu", DeviceKind::Cpu), ("cuda", DeviceKind::Cuda)];
    let spec = ResourcesSpec {
        workers,
        device: r.choice("device", &devices, DeviceKind::Auto)?,
        threads: r.whole_in("threads", 0..=MOST_THREADS, 0)? as usize,
    };
    r.finish()?;
    Ok(spec)
}

fn fault(mut r: Reader) -> Result<FaultSpec, SpecError> {
    let mut seconds = |key, default| r.number(key, 0.01, 86_400.0, default);
    let spec = FaultSpec {
        heartbeat: seconds("heartbeat", 1.0)?,
        suspicion: seconds("suspicion", 5.0)?,
        collective: seconds("collective", 30.0)?,
        hang: seconds("hang", 120.0)?,
        restart: seconds("restart", 300.0)?,
        grace: seconds("grace", 30.0)?,
        restarts_without_progress: r.whole_in("restarts_without_progress", 0..=MOST_U32, 5)? as u32,
    };
    r.finish()?;
    Ok(spec)
}
