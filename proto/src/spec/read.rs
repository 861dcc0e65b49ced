//! From a TOML job file to a [`JobSpec`]: the place that names every key and its default, with
//! `read_model.rs` for those of `[model]`.

use std::io::Read;
use std::path::Path;

use toml::{Table, Value};

use super::read_model::model;
use super::reader::{BELOW_ONE, NOT_NEGATIVE, POSITIVE, Reader, SpecError, set_place};
use super::{
    Architecture, BestOrder, CheckpointSpec, DataSpec, DeviceKind, FaultSpec, JobSpec, MOST_SEED, MOST_SPARES,
    MOST_THREADS, OptimizerKind, OptimizerSpec, Overrides, PRIORITIES, Reduction, ResourcesSpec, SECONDS, SPEC_FORMAT,
    STRAGGLER, ScheduleKind, ScheduleSpec, TrainingSpec, VALIDATION_LOSS, Workers,
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
        let text = read_text(path).map_err(read_error)?;
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
        let name = top.text("name")?;
        let (in_model, in_data, in_training) = (top.section("model")?, top.section("data")?, top.section("training")?);
        let (in_optimizer, in_schedule) = (top.section("optimizer")?, top.section("schedule")?);
        let (in_checkpoint, in_resources) = (top.section("checkpoint")?, top.section("resources")?);
        let in_fault = top.section("fault")?;
        top.finish()?;
        let name = name.ok_or_else(|| top.missing("name", "the job's name, such as name = \"tiny\""))?;
        let name = JobName::new(&name)
            .map_err(|error| top.refuse("name", format!("{name:?}"), format!("a usable name: {error}")))?;
        let (training, model) = (training(in_training)?, model(in_model)?);
        let spec = Self {
            format: SPEC_FORMAT,
            name,
            data: data(in_data, folder)?,
            optimizer: optimizer(in_optimizer, model.architecture)?,
            model,
            schedule: schedule(in_schedule, training.steps)?,
            checkpoint: checkpoint(in_checkpoint, folder)?,
            resources: resources(in_resources)?,
            fault: fault(in_fault)?,
            training,
        };
        spec.validate_new(place)?;
        Ok(spec)
    }
}

/// The text of a job file. What does not end, such as a device, is read no further than a job file can be.
fn read_text(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(std::io::Error::other(format!("a job file has at most {MOST_BYTES} bytes, this is longer")));
    }
    String::from_utf8(bytes).map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))
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

fn data(mut r: Reader, folder: &Path) -> Result<DataSpec, SpecError> {
    let (train, validation) = (r.text("train")?, r.text("validation")?);
    r.finish()?;
    let wanted = "the path of an indexed dataset without its .idx ending (make one with `cairn data prepare`)";
    let train = train.ok_or_else(|| r.missing("train", wanted))?;
    let resolve = |key: &str, text: String| match scheme(&text) {
        None => Ok(folder.join(text).display().to_string()),
        Some(scheme) => local_path(&text).map_err(|wanted| {
            r.refuse(key, format!("{text:?}"), wanted.unwrap_or_else(|| {
                format!(
                    "a path, or file:/// and an absolute path; datasets are not read from {scheme}:// in this release: \
                     copy it to a disk the workers see"
                )
            }))
        }),
    };
    Ok(DataSpec {
        train: resolve("train", train)?,
        validation: validation.map(|text| resolve("validation", text)).transpose()?,
    })
}

/// The scheme of a text that is a URL; `None` if it is a path.
pub(super) fn scheme(text: &str) -> Option<&str> {
    let (scheme, _) = text.split_once("://")?;
    let good = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    good.then_some(scheme)
}

/// The path of a `file://` URL on this machine; otherwise what would be right, if the scheme is not to blame.
fn local_path(url: &str) -> Result<String, Option<String>> {
    let rest = url.get(..7).filter(|start| start.eq_ignore_ascii_case("file://")).map(|_| &url[7..]).ok_or(None)?;
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err(Some("file:/// and an absolute path, such as file:///data/corpus.train".into()));
    }
    let mut bytes = Vec::with_capacity(path.len());
    let mut left = path.as_bytes();
    while let [first, rest @ ..] = left {
        left = rest;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = left.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let byte = digits.filter(|two| two.bytes().all(|b| b.is_ascii_hexdigit()));
        let byte = byte.and_then(|two| u8::from_str_radix(two, 16).ok()).filter(|byte| *byte != 0);
        bytes.push(byte.ok_or_else(|| Some("a URL in which % is followed by two hexadecimal digits".to_string()))?);
        left = &left[2..];
    }
    String::from_utf8(bytes).map_err(|_| Some("a URL whose path is UTF-8".into()))
}

fn training(mut r: Reader) -> Result<TrainingSpec, SpecError> {
    let steps = r.whole_if("steps", 1)?;
    let spec = TrainingSpec {
        steps: steps.unwrap_or_default(),
        sequence_length: r.size("sequence_length", 256)?,
        global_batch: r.size("global_batch", 16)?,
        micro_batch: r.size("micro_batch", 1)?,
        seed: r.whole_in("seed", 0..=MOST_SEED, 1)?,
        reduction: r.choice(
            "reduction",
            &[("exact", Reduction::Exact), ("fast", Reduction::Fast)],
            Reduction::Exact,
        )?,
        recompute: r.boolean("recompute", false)?,
        validate_every: r.whole("validate_every", 0, 0)?,
        validate_sequences: r.size("validate_sequences", 64)?,
    };
    r.finish()?;
    if steps.is_none() {
        return Err(r.missing("steps", "a whole number of at least 1"));
    }
    Ok(spec)
}

fn optimizer(mut r: Reader, architecture: Architecture) -> Result<OptimizerSpec, SpecError> {
    let kind = r.choice("kind", &[("adamw", OptimizerKind::Adamw)], OptimizerKind::Adamw)?;
    let learning_rate = r.number("learning_rate", POSITIVE, 1e-3)?;
    let betas = match r.take("betas") {
        None => [0.9, 0.95],
        Some(Value::Array(items)) if items.len() == 2 => {
            [r.as_number("betas", &items[0], BELOW_ONE)?, r.as_number("betas", &items[1], BELOW_ONE)?]
        }
        Some(other) => return Err(r.wrong("betas", &other, "a list of two numbers, such as [0.9, 0.95]".into())),
    };
    let spec = OptimizerSpec {
        kind,
        learning_rate,
        betas,
        epsilon: r.number("epsilon", POSITIVE, 1e-8)?,
        weight_decay: r.number("weight_decay", NOT_NEGATIVE, 0.1)?,
        no_decay: r.texts("no_decay", architecture.no_decay())?,
        clip_norm: match r.take("clip_norm") {
            None => Some(1.0),
            Some(Value::Boolean(false)) => None,
            Some(value) => Some(r.as_number("clip_norm", &value, POSITIVE)?),
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
        minimum_ratio: r.number("minimum_ratio", (0.0, 1.0), 0.1)?,
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
        memory: r.boolean("memory", true)?,
        memory_every: r.whole("memory_every", 0, 0)?,
        parity: r.whole("parity", 0, 1)?.try_into().unwrap_or(u32::MAX),
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
        priority: r.signed_in("priority", PRIORITIES, 0)? as i32,
        spares: r.whole_in("spares", 0..=MOST_SPARES, 0)? as u32,
    };
    r.finish()?;
    Ok(spec)
}

fn fault(mut r: Reader) -> Result<FaultSpec, SpecError> {
    let straggler = r.number("straggler", STRAGGLER, super::straggler())?;
    let mut seconds = |key, default| r.number(key, SECONDS, default);
    let spec = FaultSpec {
        straggler,
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
