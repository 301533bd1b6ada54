use serde_json::json;

use super::*;
use crate::format::tests::with_record;

fn logged(config: &AccessLog, path: &std::path::Path) -> String {
    let writers = Writers::new(Default::default());
    let logger = AccessLogger::compile(config, &writers).unwrap();
    with_record(|record| logger.log(&record));
    // The writer thread ends, everything written, when the last sender is gone.
    drop((logger, writers));
    for _ in 0..200 {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text.ends_with('\n') {
            return text;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    std::fs::read_to_string(path).unwrap_or_default()
}

fn file(path: &std::path::Path, format: AccessLogFormat) -> AccessLog {
    AccessLog { sink: AccessLogSink::File { path: path.to_str().unwrap().to_owned(), format }, filter: None }
}

#[test]
fn default_line_and_json_reach_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("text");
    let line = logged(&file(&path, AccessLogFormat::Default), &path);
    assert_eq!(
        line,
        "[2027-01-15T08:00:00.123Z] \"GET /old HTTP/1.1\" 503 UF 3 91 1 7 \"-\" \"curl/8\" \"-\" \"reviews\" \"10.0.0.9:8080\"\n"
    );
    let path = folder.path().join("json");
    let fields = json!({"code": "%RESPONSE_CODE%", "xff": "%REQ(X-FORWARDED-FOR)%", "n": {"m": "%REQ(:METHOD)% x"}});
    let line = logged(&file(&path, AccessLogFormat::Json { fields: fields.clone(), omit_empty: false }), &path);
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), json!({"code": 503, "xff": null, "n": {"m": "GET x"}}));
    let path = folder.path().join("omit");
    let line = logged(&file(&path, AccessLogFormat::Json { fields, omit_empty: true }), &path);
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), json!({"code": 503, "n": {"m": "GET x"}}));
}

#[test]
fn filters_decide() {
    let passes = |filter: AccessLogFilter, record: &Record<'_>| Filter::compile(&filter).passes(record);
    with_record(|record| {
        assert!(passes(AccessLogFilter::StatusAtLeast(400), &record));
        assert!(!passes(AccessLogFilter::StatusAtMost(400), &record));
        assert!(passes(AccessLogFilter::ResponseFlags(vec!["UF".into()]), &record));
        assert!(!passes(AccessLogFilter::ResponseFlags(vec!["NR".into()]), &record));
        let both = vec![AccessLogFilter::StatusEqual(503), AccessLogFilter::DurationAtLeastMs(2)];
        assert!(!passes(AccessLogFilter::And(both.clone()), &record) && passes(AccessLogFilter::Or(both), &record));
        let failed = AccessLogFilter::Cel("response.code >= 500".into());
        assert!(passes(failed.clone(), &record));
        assert!(!passes(AccessLogFilter::And(vec![failed, AccessLogFilter::StatusEqual(200)]), &record));
        assert!(!passes(AccessLogFilter::Cel("response.code < 500".into()), &record));
        assert!(
            passes(AccessLogFilter::Cel("response.code <".into()), &record),
            "what cannot be read leaves nothing out"
        );
    });
}
