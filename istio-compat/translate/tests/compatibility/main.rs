//! docs/istio-compatibility.md: every field of the CRDs is tried, and the page says what came of it. `UPDATE_DOCS=1` writes it.
mod fields;
mod notes;
mod probes;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use compat_objects::source::DirectorySource;
use compat_translate::{MeshOptions, Severity, translate};
use fields::Field;
use serde_json::{Value, json};

/// What came of a field.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Honoured,
    /// In force, not quite as elsewhere.
    Approximated(&'static str),
    /// The object or its target is closed or left out, and says so.
    Refused(String),
    /// In force without this field, and says so.
    Ignored(String),
    /// Means nothing for a mesh of this kind.
    Without(&'static str),
    /// Neither an effect nor a word: a mistake of ours.
    Silent,
}

/// What the mesh makes of an object: all that proxies are sent, and what was said.
struct Outcome {
    sent: String,
    said: Vec<(Severity, String, String)>,
}

fn play(field: &Field, spec: &Value) -> Outcome {
    let folder = tempfile::tempdir().expect("a folder");
    let object = json!({"apiVersion": field.api_version, "kind": field.kind, "metadata": {"name": "probe", "namespace": namespace(field)}, "spec": spec});
    std::fs::write(folder.path().join("mesh.yaml"), probes::MESH).expect("mesh.yaml");
    std::fs::write(folder.path().join("probe.yaml"), object.to_string()).expect("probe.yaml");
    let snapshot = DirectorySource::new(vec![folder.path().to_owned()]).load();
    let output = translate(&snapshot.objects, &MeshOptions::default());
    let name = format!("{} {}/probe", field.kind, namespace(field));
    let read = snapshot.faults.iter().map(|fault| (fault.severity, &fault.object, &fault.field, &fault.reason));
    let translated = output.faults.iter().map(|found| &found.fault);
    let translated = translated.map(|fault| (fault.severity, &fault.object, &fault.field, &fault.reason));
    let own = read.chain(translated).filter(|(_, object, ..)| **object == name);
    let said = own.map(|(severity, _, path, reason)| (severity, path.clone(), reason.clone())).collect();
    let statuses: Vec<_> = output.statuses.iter().filter(|status| status.key.name == "probe").collect();
    let sent = format!(
        "{:?}{:?}{:?}{:?}{statuses:?}",
        output.addresses, output.authorizations, output.waypoints, output.jwks_uris
    );
    Outcome { sent, said }
}

fn namespace(field: &Field) -> &'static str {
    if field.kind == "ReferenceGrant" { "other" } else { "shop" }
}

fn verdict(field: &Field) -> Verdict {
    if let Some(reason) = notes::without(field) {
        return Verdict::Without(reason);
    }
    let around = probes::around(field);
    let mut with = around.clone();
    probes::set(&mut with, &field.path, probes::value(field));
    let (before, after) = (play(field, &around), play(field, &with));
    let new = after.said.iter().find(|said| !before.said.contains(said));
    // What goes with the field may be spoken of already: then the field shares its fate.
    let of_parent = |(_, path, _): &&(Severity, String, String)| {
        let path = general(path);
        path.len() > "spec".len() && field.path.starts_with(&path)
    };
    let parent = after.said.iter().filter(of_parent).max_by_key(|(_, path, _)| path.len());
    if let Some((severity, _, reason)) = new.or(parent) {
        let reason = reason.split("; it is not in force").next().unwrap_or(reason).to_owned();
        return match severity {
            Severity::Error => Verdict::Refused(reason),
            Severity::Warning => Verdict::Ignored(reason),
        };
    }
    match notes::approximated(field) {
        _ if before.sent == after.sent => Verdict::Silent,
        Some(note) => Verdict::Approximated(note),
        None => Verdict::Honoured,
    }
}

/// `spec.http[3].match[0]` as the list of fields has it.
fn general(path: &str) -> String {
    let mut text = String::new();
    for character in path.chars() {
        if !(character.is_ascii_digit() && text.ends_with('[')) {
            text.push(character);
        }
    }
    text
}

fn page(verdicts: &[(Field, Verdict)]) -> String {
    let mut text = notes::HEAD.to_owned();
    let mut kinds: Vec<&str> = Vec::new();
    for (field, _) in verdicts {
        if !kinds.contains(&field.kind.as_str()) {
            kinds.push(&field.kind);
        }
    }
    for kind in kinds {
        let of_kind: Vec<_> = verdicts.iter().filter(|(field, _)| field.kind == kind).collect();
        let honoured =
            of_kind.iter().filter(|(_, v)| matches!(v, Verdict::Honoured | Verdict::Approximated(_))).count();
        let _ = writeln!(text, "\n## {kind}\n{honoured} of {} fields in force.\n", of_kind.len());
        let mut same: BTreeMap<&Verdict, Vec<&str>> = BTreeMap::new();
        for (field, verdict) in of_kind {
            same.entry(verdict).or_default().push(&field.path);
        }
        text.push_str("| | fields |\n|---|---|\n");
        for (verdict, paths) in same {
            let (word, reason) = match verdict {
                Verdict::Honoured => ("honoured", ""),
                Verdict::Approximated(note) => ("approximated", *note),
                Verdict::Refused(reason) => ("refused", reason.as_str()),
                Verdict::Ignored(reason) => ("ignored, with a warning", reason.as_str()),
                Verdict::Without(reason) => ("no effect", *reason),
                Verdict::Silent => ("SILENT", ""),
            };
            let colon = if reason.is_empty() { "" } else { ": " };
            let paths: Vec<String> = paths.iter().map(|path| format!("`{path}`")).collect();
            let _ = writeln!(text, "| **{word}**{colon}{} | {} |", reason.replace('|', "\\|"), paths.join(", "));
        }
    }
    text
}

#[test]
fn every_field_is_honoured_or_spoken_of_and_the_page_says_which() {
    let verdicts: Vec<(Field, Verdict)> =
        fields::all().into_iter().map(|field| (field.clone(), verdict(&field))).collect();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/istio-compatibility.md");
    let page = page(&verdicts);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &page).expect("docs/istio-compatibility.md");
    }
    let silent: Vec<String> = verdicts
        .iter()
        .filter(|(_, verdict)| *verdict == Verdict::Silent)
        .map(|(field, _)| format!("{} {}", field.kind, field.path))
        .collect();
    assert!(silent.is_empty(), "neither an effect nor a word:\n{}", silent.join("\n"));
    let present = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        present == page,
        "docs/istio-compatibility.md is not what the code does: run with UPDATE_DOCS=1 and look at the difference"
    );
}
