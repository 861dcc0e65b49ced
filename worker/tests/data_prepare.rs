//! Text to datasets: the tokenizers, documents, and inputs that cannot be used.

use std::fs;
use std::path::{Path, PathBuf};

use worker::data::prepare::{PrepareOptions, Report, prepare};
use worker::data::{DataError, ElementType, IndexedDataset, Tokenizer};

fn tokenizer_json() -> String {
    format!("{}/tests/data/tokenizer.json", env!("CARGO_MANIFEST_DIR"))
}

fn run(folder: &Path, tokenizer: &str, files: &[(&str, &[u8])]) -> Result<Report, DataError> {
    let write = |(name, content): &(&str, &[u8])| {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let files: Vec<PathBuf> = files.iter().map(write).collect();
    let options = PrepareOptions { tokenizer: Tokenizer::load(tokenizer)?, output: folder.join("out"), files };
    prepare(&options, &mut |_| ())
}

fn tokens(folder: &Path, name: &str) -> Vec<u32> {
    let data = IndexedDataset::open(&folder.join("out").join(name)).unwrap();
    let mut out = vec![0; data.len() as usize];
    data.read(0, u32::MAX, &mut out).unwrap();
    out
}

#[test]
fn bytes_are_the_text_itself() {
    let folder = tempfile::tempdir().unwrap();
    let report = run(folder.path(), "bytes", &[("a.train.txt", b"In the \xFF"), ("b", "é\n".as_bytes())]).unwrap();
    assert_eq!((report.vocab_size, report.element_type), (256, ElementType::U8));
    let [a, b] = &report.datasets[..] else { panic!("{report:?}") };
    assert_eq!((a.prefix.clone(), a.documents, a.tokens), (folder.path().join("out/a.train"), 1, 8));
    assert_eq!((b.prefix.clone(), b.documents, b.tokens), (folder.path().join("out/b"), 1, 3));
    assert_eq!(fs::read(folder.path().join("out/a.train.bin")).unwrap(), b"In the \xFF");
    assert_eq!(fs::read_dir(folder.path().join("out")).unwrap().count(), 4);
}

#[test]
fn gpt2_gives_the_published_ids() {
    let gpt2 = Tokenizer::load("gpt2").unwrap();
    assert_eq!(gpt2.encode("Hello world").unwrap(), [15496, 995]);
    assert_eq!(gpt2.encode("Hello, I'm a language model,").unwrap(), [15496, 11, 314, 1101, 257, 3303, 2746, 11]);
    assert!(!gpt2.encode("<|endoftext|>").unwrap().contains(&50256), "text that looks special is text");
    assert_eq!((gpt2.vocab_size(), gpt2.end_of_text()), (50257, Some(50256)));

    let folder = tempfile::tempdir().unwrap();
    let report = run(folder.path(), "gpt2", &[("a.txt", b"Hello world")]).unwrap();
    assert_eq!(report.element_type, ElementType::U16);
    assert_eq!(tokens(folder.path(), "a"), [15496, 995, 50256]);
}

#[test]
fn gpt2_in_pieces_is_gpt2_whole() {
    // Several pieces, with runs of white space of every kind and characters of several bytes at their ends.
    let mut text = String::new();
    for number in 0..120_000 {
        let space = [" ", "  ", "\n", "\n\n", " \t ", "\u{a0}", "\r\n\r\n", "\u{3000} "][number * 7 % 8];
        text.push_str(["naïve", "it's", "日本語", "12,345", "word—dash", "🙂"][number * 5 % 6]);
        text.push_str(space);
    }
    assert!(text.len() > 1 << 20);
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), "gpt2", &[("a.txt", text.as_bytes())]).unwrap();
    let mut whole = Tokenizer::load("gpt2").unwrap().encode(&text).unwrap();
    whole.push(50256);
    assert!(tokens(folder.path(), "a") == whole);
}

#[test]
fn a_tokenizer_json_is_used_untruncated() {
    let folder = tempfile::tempdir().unwrap();
    let report = run(folder.path(), &tokenizer_json(), &[("a.txt", b"In the beginning . God")]).unwrap();
    // Ids go up to 9: a vocabulary with gaps.
    assert_eq!((report.vocab_size, report.element_type), (10, ElementType::U8));
    assert_eq!(tokens(folder.path(), "a"), [1, 2, 3, 4, 0, 9]);
}

#[test]
fn each_line_of_a_jsonl_is_a_document() {
    let folder = tempfile::tempdir().unwrap();
    let lines = b"{\"text\": \"ab\", \"id\": 1}\n\n{\"text\": \"c\"}\n{\"text\": \"\"}\n{\"text\": \"\\u00e9\"}";
    let report = run(folder.path(), "bytes", &[("a.jsonl", lines)]).unwrap();
    assert_eq!((report.datasets[0].documents, report.datasets[0].tokens), (3, 5));
    assert_eq!(tokens(folder.path(), "a"), [97, 98, 99, 0xC3, 0xA9]);
    run(folder.path(), "gpt2", &[("a.jsonl", lines)]).unwrap();
    assert_eq!(tokens(folder.path(), "a").iter().filter(|token| **token == 50256).count(), 4);
}

#[test]
fn progress_ends_at_the_total() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a.txt");
    fs::write(&file, vec![b'a'; 3 << 20]).unwrap();
    for tokenizer in ["bytes", &tokenizer_json()] {
        let tokenizer = Tokenizer::load(tokenizer).unwrap();
        let options = PrepareOptions { tokenizer, output: folder.path().join("out"), files: vec![file.clone()] };
        let (mut calls, mut last) = (0, (0, 0));
        prepare(&options, &mut |progress| {
            calls += 1;
            last = (progress.bytes_done, progress.bytes_total);
        })
        .unwrap();
        assert!(calls > 0);
        assert_eq!(last, (3 << 20, 3 << 20));
    }
}

#[test]
fn input_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let json = tokenizer_json();
    type Case<'a> = (&'a str, &'a [(&'a str, &'a [u8])], &'a [&'a str]);
    let cases: &[Case<'_>] = &[
        ("bytes", &[], &["no text file"]),
        ("bytes", &[("empty.txt", b"")], &["empty.txt", "empty"]),
        ("bytes", &[("blank.jsonl", b"\n \n")], &["blank.jsonl", "no text"]),
        ("bytes", &[("same.txt", b"a"), ("same.md", b"b")], &["same.md", "same.txt", "same dataset"]),
        ("gpt2", &[("bad.txt", b"abc \xFF def")], &["bad.txt", "byte 4", "UTF-8", "bytes"]),
        ("gpt2", &[("cut.txt", b"abc \xC3")], &["cut.txt", "byte 4", "UTF-8"]),
        (&json, &[("bad.txt", b"\xFF")], &["bad.txt", "byte 0", "UTF-8"]),
        ("bytes", &[("bad.jsonl", b"{\"text\": \"a\"}\n{\"txt\": \"b\"}")], &["bad.jsonl", "line 2", "text"]),
        ("bytes", &[("bad.jsonl", b"{\"text\": \"\xFF\"}")], &["bad.jsonl", "line 1"]),
        ("gpt3", &[("a.txt", b"a")], &["gpt3", "bytes, gpt2", "tokenizer.json"]),
    ];
    for (tokenizer, files, wanted) in cases {
        let error = run(folder.path(), tokenizer, files).expect_err("cannot be used").to_string();
        for part in *wanted {
            assert!(error.contains(part), "{error:?} should contain {part:?}");
        }
    }
    let options = |file: PathBuf| PrepareOptions {
        tokenizer: Tokenizer::Bytes,
        output: folder.path().join("out"),
        files: vec![folder.path().join("same.txt"), file],
    };
    for (file, part) in [(folder.path().join("missing.txt"), "missing.txt"), (folder.path().to_owned(), "not a file")] {
        let error = prepare(&options(file), &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let not_json = folder.path().join("same.txt");
    let error = Tokenizer::load(not_json.to_str().unwrap()).unwrap_err().to_string();
    assert!(error.contains("not a Hugging Face tokenizer.json"), "{error}");
    let left = fs::read_dir(folder.path().join("out")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "nothing was made, nothing is left");
}

/// A text that is one of the files to be made, by its name or by another, or of another text's dataset.
#[test]
fn a_text_is_never_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let refused = |output: &Path, files: &[PathBuf], named: &Path| {
        let options = PrepareOptions { tokenizer: Tokenizer::Bytes, output: output.into(), files: files.to_vec() };
        let error = prepare(&options, &mut |_| ()).unwrap_err().to_string();
        for part in [&*named.display().to_string(), "written over", "--output"] {
            assert!(error.contains(part), "{error:?} should contain {part:?}");
        }
    };
    for name in ["a.bin", "a.idx"] {
        fs::write(place(name), "precious").unwrap();
        refused(folder.path(), &[place(name)], &place(name));
        assert_eq!(fs::read(place(name)).unwrap(), b"precious");
    }
    // `b.bin` as a text of its own would make b.bin.bin, but the text b.txt makes b.bin.
    fs::write(place("b.txt"), "one").unwrap();
    fs::write(place("b.bin.txt"), "two").unwrap();
    fs::hard_link(place("b.bin.txt"), place("b.idx.partial")).unwrap();
    refused(folder.path(), &[place("b.txt"), place("b.bin.txt")], &place("b.bin.txt"));
    // By a link elsewhere.
    fs::create_dir(place("out")).unwrap();
    std::os::unix::fs::symlink(place("b.txt"), place("out/b.bin.partial")).unwrap();
    refused(&place("out"), &[place("b.txt")], &place("b.txt"));
    assert_eq!(
        (fs::read(place("b.txt")).unwrap(), fs::read(place("b.bin.txt")).unwrap()),
        (b"one".into(), b"two".into())
    );
    // A dataset of before is made anew.
    fs::remove_file(place("out/b.bin.partial")).unwrap();
    for _ in 0..2 {
        let files = vec![place("b.txt")];
        let options = PrepareOptions { tokenizer: Tokenizer::Bytes, output: place("out"), files };
        prepare(&options, &mut |_| ()).unwrap();
    }
}

#[test]
fn the_shipped_corpus_is_whole() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data");
    let train = IndexedDataset::open(&folder.join("corpus.train")).unwrap();
    let held_out = IndexedDataset::open(&folder.join("corpus.validation")).unwrap();
    assert!(train.len() > 4_000_000 && held_out.len() > 200_000, "{} and {}", train.len(), held_out.len());
    train.check_vocabulary(128).unwrap();
    held_out.check_vocabulary(128).unwrap();
    let mut start = [0; 9];
    train.read(0, 128, &mut start).unwrap();
    assert_eq!(start.map(|token| token as u8), *b"Genesis 1");
}
