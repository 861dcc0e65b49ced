//! `[model]`: the published sizes, what each architecture's keys come to, and what is refused.

use std::path::Path;

use super::{Architecture, FeedForward, JobSpec, Layout, ModelSpec, Norm, Overrides, PRESETS, Positions};

const JOB: &str = "name = \"t\"\ndata.train = \"/x\"\ntraining.steps = 2\n";
const GPT2: &str = "model = { architecture = \"gpt2\", hidden_size = 48, num_hidden_layers = 2, \
                    num_attention_heads = 3, vocab_size = 99 }\n";

fn parse(model: &str, set: &[(&str, &str)]) -> Result<JobSpec, String> {
    let overrides: Overrides = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    let text = format!("{JOB}{model}");
    JobSpec::parse("job.toml", &text, Path::new("/"), &overrides).map_err(|error| error.to_string())
}

fn elements(spec: &ModelSpec) -> usize {
    spec.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

#[test]
fn presets_have_the_published_numbers_of_parameters() {
    for (name, count) in [
        ("gpt2-124m", 124_439_808),
        ("gpt2-350m", 354_823_168),
        ("gpt2-774m", 774_030_080),
        ("gpt2-1.5b", 1_557_611_200),
        ("llama-1b", 1_100_048_384),
        ("llama-8b", 8_030_261_248),
    ] {
        assert_eq!(elements(&ModelSpec::preset(name).unwrap()), count, "{name}");
    }
    let counts: Vec<usize> = PRESETS.iter().map(|name| elements(&ModelSpec::preset(name).unwrap())).collect();
    assert!(counts.is_sorted(), "{counts:?}");
    for name in PRESETS {
        let spec = parse(&format!("model.preset = {name:?}\n"), &[]).unwrap();
        assert_eq!(Some(spec.model), ModelSpec::preset(name), "a job file's preset is the preset");
    }
    assert_eq!(ModelSpec::preset("llama-8b").unwrap().block().positions, Positions::Rotary { theta: 500_000.0 });
}

#[test]
fn a_gpt2_needs_four_keys_and_has_its_own_defaults() {
    let spec = parse(GPT2, &[]).unwrap();
    let m = &spec.model;
    assert_eq!((m.intermediate_size, m.head_dim, m.num_key_value_heads), (192, 16, 3));
    assert_eq!((m.tie_word_embeddings, m.max_position_embeddings), (true, Some(1024)));
    assert_eq!((m.layer_norm_epsilon, m.rms_norm_eps, m.rope_theta), (Some(1e-5), None, None));
    let block = m.block();
    assert_eq!((block.norm, block.feed_forward, block.layout), (Norm::Layer, FeedForward::Gelu, Layout::InOut));
    assert_eq!((block.biases, block.positions), (true, Positions::Learned { most: 1024 }));
    let undecayed: Vec<String> = m.tensors().into_iter().map(|(name, _)| name).filter(|n| n.contains("ln_")).collect();
    assert_eq!(undecayed.len(), 2 * (2 * 2 + 1));
    assert_eq!(spec.optimizer.no_decay, ["bias", "ln_"]);
    assert_eq!(parse("model.preset = \"tiny\"\n", &[]).unwrap().optimizer.no_decay, ["norm"]);
    let own = parse(GPT2, &[("model.layer_norm_epsilon", "1e-6"), ("optimizer.no_decay", "[]")]).unwrap();
    assert_eq!((own.model.block().epsilon, own.optimizer.no_decay.len()), (1e-6, 0));
    let untied = parse(GPT2, &[("model.tie_word_embeddings", "false")]).unwrap().model;
    assert_eq!(untied.tensors().last().unwrap(), &("lm_head.weight".to_string(), vec![99, 48]));
}

#[test]
fn tensors_are_those_of_the_published_model() {
    let list = ModelSpec::preset("gpt2-124m").unwrap().tensors();
    assert_eq!(list.len(), 2 + 12 * 12 + 2);
    let expected: [(&str, &[usize]); 14] = [
        ("transformer.wte.weight", &[50_257, 768]),
        ("transformer.wpe.weight", &[1024, 768]),
        ("transformer.h.0.ln_1.weight", &[768]),
        ("transformer.h.0.ln_1.bias", &[768]),
        ("transformer.h.0.attn.c_attn.weight", &[768, 2304]),
        ("transformer.h.0.attn.c_attn.bias", &[2304]),
        ("transformer.h.0.attn.c_proj.weight", &[768, 768]),
        ("transformer.h.0.attn.c_proj.bias", &[768]),
        ("transformer.h.0.ln_2.weight", &[768]),
        ("transformer.h.0.ln_2.bias", &[768]),
        ("transformer.h.0.mlp.c_fc.weight", &[768, 3072]),
        ("transformer.h.0.mlp.c_fc.bias", &[3072]),
        ("transformer.h.0.mlp.c_proj.weight", &[3072, 768]),
        ("transformer.h.0.mlp.c_proj.bias", &[768]),
    ];
    for ((name, shape), (wanted, size)) in list.iter().zip(expected) {
        assert_eq!((name.as_str(), shape.as_slice()), (wanted, size));
    }
    assert_eq!(list[list.len() - 1], ("transformer.ln_f.bias".to_string(), vec![768]));
}

#[test]
fn keys_of_another_architecture_are_refused() {
    let of_llama = "left out: it belongs to architecture \"llama\", and this model's is \"gpt2\"";
    let of_gpt2 = "left out: it belongs to architecture \"gpt2\", and this model's is \"llama\"";
    for (model, key, value, wanted) in [
        (GPT2, "rope_theta", "10000", of_llama),
        (GPT2, "rms_norm_eps", "1e-5", of_llama),
        (GPT2, "num_key_value_heads", "3", of_llama),
        (GPT2, "head_dim", "16", of_llama),
        ("model.preset = \"tiny\"\n", "max_position_embeddings", "1024", of_gpt2),
        ("model.preset = \"tiny\"\n", "layer_norm_epsilon", "1e-5", of_gpt2),
        ("model.preset = \"tiny\"\n", "architecture", "\"gpt2\"", "\"llama\", as preset \"tiny\" is, or left out"),
        ("model.preset = \"gpt2-124m\"\n", "architecture", "\"llama\"", "\"gpt2\", as preset \"gpt2-124m\" is"),
        (GPT2, "architecture", "\"gpt-2\"", "did you mean \"gpt2\""),
        (GPT2, "num_attention_heads", "5", "a divisor of model.hidden_size = 48"),
        (GPT2, "num_attention_heads", "16", "even"),
        (GPT2, "max_position_embeddings", "0", "at least 1"),
    ] {
        let message = parse(model, &[(&format!("model.{key}"), value)]).expect_err(key);
        assert!(message.contains("model.") && message.contains(wanted), "{key} = {value}: {message}");
    }
    let misspelt = parse(GPT2, &[("model.max_positions_embedding", "64")]).unwrap_err();
    assert!(misspelt.contains("did you mean `model.max_position_embeddings`"), "{misspelt}");
}

#[test]
fn a_sequence_has_a_position_for_each_token() {
    let long = [("training.sequence_length", "1025")];
    let message = parse(GPT2, &long).unwrap_err();
    let wanted = "`training.sequence_length` is 1025, but must be at most model.max_position_embeddings = 1024";
    assert!(message.contains(wanted), "{message}");
    parse(GPT2, &[long[0], ("model.max_position_embeddings", "1025")]).unwrap();
    parse("model.preset = \"tiny\"\n", &long).unwrap();
}

/// The very text that versions before GPT-2 stored: it reads, and is written again as it was.
#[test]
fn a_stored_llama_is_written_as_it_always_was() {
    let stored = "{\"architecture\":\"llama\",\"hidden_size\":128,\"num_hidden_layers\":4,\"num_attention_heads\":4,\
                  \"num_key_value_heads\":2,\"head_dim\":32,\"intermediate_size\":352,\"vocab_size\":256,\
                  \"tie_word_embeddings\":true,\"rope_theta\":10000.0,\"rms_norm_eps\":0.00001,\
                  \"initializer_range\":0.02}";
    let spec: ModelSpec = serde_json::from_str(stored).unwrap();
    assert_eq!(spec, ModelSpec::preset("tiny").unwrap());
    spec.validate("the store").unwrap();
    let again = serde_json::to_string(&spec).unwrap();
    let number = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    assert_eq!(number(&again), number(stored));
    assert!(again.starts_with(&stored[..200]), "{again}");
    assert!(again.ends_with("\"initializer_range\":0.02}"), "{again}");
    let gpt2 = parse(GPT2, &[]).unwrap();
    let text = serde_json::to_string(&gpt2).unwrap();
    assert!(!text.contains("rope_theta") && text.contains("\"max_position_embeddings\":1024"), "{text}");
    assert_eq!(serde_json::from_str::<JobSpec>(&text).unwrap(), gpt2);
}

#[test]
fn a_spec_from_the_wire_has_what_belongs_to_its_architecture_alone() {
    type Change = fn(&mut ModelSpec);
    let changes: [(&str, Change); 7] = [
        ("max_position_embeddings", |m| m.max_position_embeddings = None),
        ("max_position_embeddings", |m| m.max_position_embeddings = Some(0)),
        ("max_position_embeddings", |m| m.max_position_embeddings = Some(usize::MAX)),
        ("layer_norm_epsilon", |m| m.layer_norm_epsilon = Some(f64::NAN)),
        ("rope_theta", |m| m.rope_theta = Some(10_000.0)),
        ("num_key_value_heads", |m| m.num_key_value_heads = 1),
        ("head_dim", |m| m.head_dim = 32),
    ];
    let good = parse(GPT2, &[]).unwrap().model;
    for (key, change) in changes {
        let mut spec = good.clone();
        change(&mut spec);
        let message = spec.validate("the wire").expect_err(key).to_string();
        assert!(message.starts_with("the wire: ") && message.contains(&format!("`model.{key}` is ")), "{message}");
    }
    let mut other = ModelSpec::preset("tiny").unwrap();
    other.architecture = Architecture::Gpt2;
    assert!(other.validate("the wire").is_err());
    let mut bare = ModelSpec::preset("tiny").unwrap();
    bare.rope_theta = None;
    let message = bare.validate("the wire").unwrap_err().to_string();
    assert!(message.contains("key `model.rope_theta` is missing"), "{message}");
}
