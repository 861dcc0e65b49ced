//! What a person sees: the bar on the terminal, the lines wherever standard output leads.

use std::fs;
use std::process::{Command, Stdio};

use tests::job::Job;
use tests::run::Run;

/// Runs `cairn train` in a terminal of its own, which `script` records, with standard output redirected to a file.
/// Returns the terminal's and the file's text; `None` if there is no `script`.
fn in_terminal(job: &Job, arguments: &str) -> Option<(String, String)> {
    Command::new("script").arg("--version").output().ok()?;
    let place = |name: &str| job.folder().join(name).display().to_string();
    let (screen, lines) = (place("screen"), place("lines"));
    let command = format!("{} train {} {arguments} > {lines}", tests::cairn().display(), job.file().display());
    let mut script = Command::new("script");
    script.args(["-q", "-e", "-c", &command, &screen]).stdin(Stdio::null()).stdout(Stdio::null());
    let status = script.status().expect("script runs");
    assert!(status.success(), "{status:?}: {}", fs::read_to_string(&screen).unwrap_or_default());
    let read = |path: &str| String::from_utf8_lossy(&fs::read(path).expect("read")).into_owned();
    Some((read(&screen), read(&lines)))
}

#[test]
fn lines_follow_standard_output_and_the_bar_stays() {
    let job = Job::new();
    let Some((screen, lines)) = in_terminal(&job, "--workers 2 --steps 12") else {
        tests::skip("no `script` to make a terminal with (util-linux has it)");
        return;
    };
    for line in
        ["generation 1: 2 workers", "validation loss", "checkpoint stored", "step 12/12", "paused after step 12"]
    {
        assert!(lines.contains(line), "{line:?} is not on standard output:\n{lines}");
        let shown = screen.lines().any(|shown| shown.starts_with(line));
        assert!(!shown, "{line:?} is on the terminal, though standard output is elsewhere:\n{screen}");
    }
    assert!(screen.contains("━") && screen.contains("checkpoint none yet"), "no bar:\n{screen}");
    assert!(!lines.contains('\u{1b}') && !lines.contains('━'), "terminal codes in the file:\n{lines}");

    let (screen, lines) = in_terminal(&job, "--resume --workers 1 --steps 15").expect("it was there before");
    assert!(!screen.contains("none yet") && !lines.contains("none yet"), "{screen}\n{lines}");
    assert!(screen.contains("checkpoint step 12"), "the bar names what the job goes on from:\n{screen}");
}

#[test]
fn without_a_terminal_lines_name_the_checkpoint_gone_on_from() {
    let job = Job::with(&["checkpoint.every_steps=1000"]);
    let file = job.file().display().to_string();
    let first = Run::start(&["train", &file, "--steps", "7"]).finish();
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let text = |outcome: &tests::run::Outcome| {
        outcome.events.iter().filter_map(|line| line.as_str()).collect::<Vec<_>>().join("\n")
    };
    assert!(text(&first).contains("checkpoint none yet"), "{}", text(&first));
    let resumed = Run::start(&["train", &file, "--resume", "--steps", "9"]).finish();
    assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
    assert!(text(&resumed).contains("step 8/9") && text(&resumed).contains("checkpoint step 7"), "{}", text(&resumed));
    assert!(!text(&resumed).contains("none yet"), "{}", text(&resumed));
}
