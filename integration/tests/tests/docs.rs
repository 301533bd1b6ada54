//! The documentation says what is true: links lead somewhere, commands and flags exist, samples are the ones shipped.
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use strata_integration::repository;

fn pages() -> Vec<PathBuf> {
    fn add(folder: &Path, pages: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("a folder of docs").flatten() {
            let path = entry.path();
            if path.is_dir() {
                add(&path, pages);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    let mut pages = vec![repository().join("README.md")];
    add(&repository().join("docs"), &mut pages);
    add(&repository().join("manifests"), &mut pages);
    pages
}

fn read(page: &Path) -> String {
    std::fs::read_to_string(page).unwrap_or_else(|error| panic!("{}: {error}", page.display()))
}

#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    let mut links = 0;
    for page in pages() {
        for target in read(&page).split("](").skip(1).filter_map(|rest| rest.split(')').next().map(str::to_owned)) {
            let path = target.split('#').next().unwrap_or_default();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            links += 1;
            if !page.parent().expect("a page is in a folder").join(path).exists() {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    assert!(links > 5, "only {links} links found: are the pages read?");
    assert_eq!(broken, Vec::<String>::new());
}

#[test]
fn make_targets_exist() {
    let makefile = read(&repository().join("Makefile"));
    let targets: BTreeSet<&str> =
        makefile.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name).collect();
    let mut missing = Vec::new();
    for page in pages() {
        for line in code(&read(&page)) {
            if let Some(target) = line.strip_prefix("make ").and_then(|rest| rest.split_whitespace().next())
                && !targets.contains(target)
            {
                missing.push(format!("{}: make {target}", page.display()));
            }
        }
    }
    assert_eq!(missing, Vec::<String>::new());
}

/// Lines of code: fenced blocks, and blocks indented by four blanks.
fn code(text: &str) -> Vec<String> {
    let mut fenced = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced || line.starts_with("    ") {
            lines.push(line.trim().trim_start_matches("$ ").to_owned());
        }
    }
    lines
}

#[test]
fn commands_and_flags_exist() {
    // Test programs are in target/PROFILE/deps, the binaries in the folder above.
    let own = std::env::current_exe().expect("own path");
    let strata = own.parent().and_then(Path::parent).expect("a folder above deps").join("strata");
    let mut wrong = Vec::new();
    let mut commands = 0;
    for page in pages() {
        for line in code(&read(&page)) {
            let line = line.split('#').next().unwrap_or_default().to_owned();
            let Some(rest) = line.strip_prefix("target/debug/strata ").or_else(|| line.strip_prefix("strata ")) else {
                continue;
            };
            commands += 1;
            let own = rest.split(" -- ").next().unwrap_or_default();
            let words: Vec<&str> = own.split_whitespace().collect();
            let help = Command::new(&strata).args([words[0], "--help"]).output();
            let help = help.unwrap_or_else(|error| panic!("{}: {error} (make build)", strata.display()));
            let text = String::from_utf8_lossy(&help.stdout).into_owned();
            let unknown = words.iter().filter(|word| word.starts_with("--") && !text.contains(**word));
            let unknown: Vec<_> = unknown.collect();
            if !help.status.success() || !unknown.is_empty() {
                wrong.push(format!("{}: {line} (unknown: {unknown:?})", page.display()));
            }
        }
    }
    assert!(commands > 5, "only {commands} commands found: are the pages read?");
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn objects_shown_are_objects() {
    let mut shown = 0;
    for page in pages() {
        let text = read(&page);
        for block in text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            if !block.contains("apiVersion:") {
                continue;
            }
            let (objects, faults) = compat_objects::read_str(block, &page);
            assert!(faults.is_empty(), "{}: {faults:?}", page.display());
            shown += objects.len();
        }
    }
    assert!(shown > 0, "no object found: are the pages read?");
}
