//! Whatever stands in a file, reading it ends with objects and faults, never with a panic; what it names is there.
use std::path::{Path, PathBuf};

use compat_objects::read_str;
use proptest::prelude::*;

fn cases() -> Vec<String> {
    let dir: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../integration/testdata/istiod/cases");
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read_to_string(file).unwrap()).collect()
}

/// One wound of a text.
#[derive(Clone, Debug)]
enum Damage {
    Cut(prop::sample::Index, usize),
    Insert(prop::sample::Index, &'static str),
    Swap(&'static str, &'static str),
}

fn damage() -> impl Strategy<Value = Damage> {
    const BITS: &[&str] =
        &["{", "}", "[", "]", ":", "- ", "\n", "'", "\"", "&a ", "*a", "null", "-1", "70000", "!!int ", "\t", "---\n"];
    const SWAPS: &[(&str, &str)] = &[
        ("shop", "''"),
        ("name:", "nmae:"),
        ("80", "eighty"),
        ("{", "{x: 1, "),
        ("spec", "sepc"),
        ("reviews", "[]"),
        ("s,", "y,"),
    ];
    prop_oneof![
        (any::<prop::sample::Index>(), 1usize..40).prop_map(|(at, len)| Damage::Cut(at, len)),
        (any::<prop::sample::Index>(), prop::sample::select(BITS)).prop_map(|(at, text)| Damage::Insert(at, text)),
        prop::sample::select(SWAPS).prop_map(|(from, to)| Damage::Swap(from, to)),
    ]
}

fn apply(text: &str, damage: &Damage) -> String {
    let chars: Vec<char> = text.chars().collect();
    if chars.is_empty() {
        return String::new();
    }
    match damage {
        Damage::Cut(at, len) => {
            let start = at.index(chars.len());
            chars[..start].iter().chain(chars.iter().skip(start + len)).collect()
        }
        Damage::Insert(at, bit) => {
            let start = at.index(chars.len());
            chars[..start].iter().copied().chain(bit.chars()).chain(chars[start..].iter().copied()).collect()
        }
        Damage::Swap(from, to) => text.replace(from, to),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn damaged_files_are_told_and_survived(case in any::<prop::sample::Index>(), wounds in prop::collection::vec(damage(), 1..4)) {
        let cases = cases();
        let text = wounds.iter().fold(cases[case.index(cases.len())].clone(), |text, wound| apply(&text, wound));
        let lines = text.lines().count() as u32 + 1;
        let (_, faults) = read_str(&text, Path::new("damaged.yaml"));
        for fault in &faults {
            prop_assert!(fault.line <= lines, "{}", fault);
            prop_assert!(!fault.reason.is_empty() && !fault.reason.contains('\n'), "{}", fault);
            prop_assert!(fault.to_string().starts_with("damaged.yaml:"), "{}", fault);
        }
    }
}
