#!/bin/sh
# Makes the corpus in this folder again, from the Debian packages bible-kjv-text (the text) and bible-kjv (the program
# that unpacks it). Needs a Debian or Ubuntu system with network access, and Rust. Nothing is installed.
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

(cd "$work" && apt-get download bible-kjv-text bible-kjv && for package in *.deb; do dpkg -x "$package" unpacked; done)

# One verse a line, a heading before each chapter. The program indents verses; the corpus does not.
LD_LIBRARY_PATH="$work/unpacked/usr/lib" \
    "$work/unpacked/usr/bin/bible" -l 100000 -p "$work/unpacked/usr/lib" 'gen1:1-rev22:21' </dev/null |
    sed -e 's/^  *//' -e '1{/^$/d;}' >"$work/whole.txt"

# Held out: the last twentieth, from the first letter to the Thessalonians on.
first=$(grep -n '^1 Thessalonians 1$' "$work/whole.txt" | cut -d: -f1)
head -n "$((first - 1))" "$work/whole.txt" >"$work/corpus.train.txt"
tail -n "+$first" "$work/whole.txt" >"$work/corpus.validation.txt"

cargo run --bin cairn -- data prepare --tokenizer bytes --output . \
    "$work/corpus.train.txt" "$work/corpus.validation.txt"
