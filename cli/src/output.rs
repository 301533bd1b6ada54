//! Tables for people, JSON and YAML for programs; colours only on a terminal.
use std::io::{IsTerminal, Write};

use anyhow::{Context, Result};
use clap::ValueEnum;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table};
use serde::Serialize;

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

/// What a cell's colour says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Good,
    Bad,
    Faint,
    Strong,
}

/// A text with a tone, coloured if standard output is a terminal.
pub(crate) fn paint(text: &str, tone: Tone) -> String {
    let code = match tone {
        Tone::Good => "32",
        Tone::Bad => "31",
        Tone::Faint => "2",
        Tone::Strong => "1",
    };
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// A table without lines, as kubectl prints it.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    let header = header.iter().map(|title| Cell::new(title).set_alignment(CellAlignment::Left));
    table.set_header(header);
    table
}

/// Prints a line to standard output.
///
/// # Errors
/// Standard output is closed, as by `strata observe | head`.
pub(crate) fn line(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("writing to standard output")
}

/// Prints one value in a format for programs.
pub(crate) fn document(format: Format, value: &impl Serialize) -> Result<()> {
    match format {
        Format::Yaml => line(serde_saphyr::to_string(value)?.trim_end()),
        Format::Json | Format::Table => line(&serde_json::to_string_pretty(value)?),
    }
}

/// Prints one record of a stream: a line of JSON, or a YAML document.
pub(crate) fn record(format: Format, value: &impl Serialize) -> Result<()> {
    match format {
        Format::Yaml => line(&format!("---\n{}", serde_saphyr::to_string(value)?.trim_end())),
        Format::Json | Format::Table => line(&serde_json::to_string(value)?),
    }
}

/// Whether the reader of our output went away, which is no failure.
pub(crate) fn closed(error: &anyhow::Error) -> bool {
    let io = error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.into_iter().any(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
