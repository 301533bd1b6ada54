//! Access logs: compiled formats and filters, written by one thread per file.

mod writer;

use serde_json::{Map, Value};
use xds_model::envoy::telemetry::{AccessLog, AccessLogFilter, AccessLogFormat, AccessLogSink};

use crate::expression::Expression;
use crate::format::{Format, FormatError};
use crate::record::Record;
use writer::Writer;
pub(crate) use writer::Writers;

/// Envoy's default line, which Istio's mesh configuration usually replaces.
const DEFAULT_FORMAT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \
\"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// One access log, ready to write.
pub struct AccessLogger {
    shape: Shape,
    filter: Option<Filter>,
    writer: Option<Writer>,
}

/// Which requests are logged.
enum Filter {
    Plain(AccessLogFilter),
    Expression(Expression),
    And(Vec<Filter>),
    Or(Vec<Filter>),
}

enum Shape {
    Text(Format),
    Json { fields: Node, omit_empty: bool },
}

/// A JSON template with formats at its leaves.
enum Node {
    Format(Format),
    Object(Vec<(String, Node)>),
    List(Vec<Node>),
    Constant(Value),
}

impl AccessLogger {
    pub(crate) fn compile(config: &AccessLog, writers: &Writers) -> Result<Self, FormatError> {
        let (shape, writer) = match &config.sink {
            AccessLogSink::File { path, format } => (Shape::compile(format)?, Some(writers.open(path))),
            AccessLogSink::Other { name, type_url } => {
                tracing::warn!(name, type_url, "this access log sink is not served");
                (Shape::Text(Format::parse("")?), None)
            }
        };
        Ok(Self { shape, filter: config.filter.as_ref().map(Filter::compile), writer })
    }

    /// Writes the record's line unless the filter leaves it out.
    pub fn log(&self, record: &Record<'_>) {
        let Some(writer) = &self.writer else { return };
        if self.filter.as_ref().is_some_and(|filter| !filter.passes(record)) {
            return;
        }
        let mut line = String::with_capacity(512);
        match &self.shape {
            Shape::Text(format) => format.write(record, &mut line),
            Shape::Json { fields, omit_empty } => {
                line.push_str(&fields.render(record, *omit_empty).unwrap_or(Value::Null).to_string());
                line.push('\n');
            }
        }
        writer.send(line);
    }
}

impl Shape {
    fn compile(format: &AccessLogFormat) -> Result<Self, FormatError> {
        Ok(match format {
            AccessLogFormat::Default => Self::Text(Format::parse(DEFAULT_FORMAT)?),
            AccessLogFormat::Text(text) => Self::Text(Format::parse(text)?),
            AccessLogFormat::Json { fields, omit_empty } => {
                Self::Json { fields: Node::compile(fields)?, omit_empty: *omit_empty }
            }
        })
    }
}

impl Node {
    fn compile(value: &Value) -> Result<Self, FormatError> {
        Ok(match value {
            Value::String(text) => Self::Format(Format::parse(text)?),
            Value::Object(map) => {
                let field = |(key, value): (&String, &Value)| Ok((key.clone(), Self::compile(value)?));
                Self::Object(map.iter().map(field).collect::<Result<_, FormatError>>()?)
            }
            Value::Array(list) => Self::List(list.iter().map(Self::compile).collect::<Result<_, _>>()?),
            constant => Self::Constant(constant.clone()),
        })
    }

    /// `None`: left out because it is empty.
    fn render(&self, record: &Record<'_>, omit_empty: bool) -> Option<Value> {
        let value = match self {
            Self::Format(format) => format.json(record),
            Self::Object(fields) => {
                let field = |(key, node): &(String, Self)| Some((key.clone(), node.render(record, omit_empty)?));
                Value::Object(fields.iter().filter_map(field).collect::<Map<_, _>>())
            }
            Self::List(list) => list.iter().filter_map(|node| node.render(record, omit_empty)).collect(),
            Self::Constant(value) => value.clone(),
        };
        (!(omit_empty && value.is_null())).then_some(value)
    }
}

impl Filter {
    /// An expression that cannot be read leaves nothing out: a log that is too long misses nothing.
    fn compile(filter: &AccessLogFilter) -> Self {
        match filter {
            AccessLogFilter::And(all) => Self::And(all.iter().map(Self::compile).collect()),
            AccessLogFilter::Or(any) => Self::Or(any.iter().map(Self::compile).collect()),
            AccessLogFilter::Cel(text) => match Expression::compile(text) {
                Ok(expression) => Self::Expression(expression),
                Err(error) => {
                    tracing::warn!(
                        expression = text,
                        error,
                        "an access log's filter cannot be read: everything is logged"
                    );
                    Self::Plain(AccessLogFilter::Unsupported(text.clone()))
                }
            },
            plain => Self::Plain(plain.clone()),
        }
    }

    fn passes(&self, record: &Record<'_>) -> bool {
        match self {
            Self::Plain(filter) => passes(filter, record),
            Self::Expression(expression) => expression.holds(record),
            Self::And(all) => all.iter().all(|filter| filter.passes(record)),
            Self::Or(any) => any.iter().any(|filter| filter.passes(record)),
        }
    }
}

/// Of one that holds no others.
fn passes(filter: &AccessLogFilter, record: &Record<'_>) -> bool {
    let status = u32::from(record.status);
    match filter {
        AccessLogFilter::StatusAtLeast(bound) => status >= *bound,
        AccessLogFilter::StatusAtMost(bound) => status <= *bound,
        AccessLogFilter::StatusEqual(wanted) => status == *wanted,
        AccessLogFilter::ResponseFlags(wanted) if wanted.is_empty() => !record.flags.is_empty(),
        AccessLogFilter::ResponseFlags(wanted) => {
            record.flags.texts().any(|flag| wanted.iter().any(|wanted| wanted == flag))
        }
        AccessLogFilter::DurationAtLeastMs(bound) => record.duration.as_millis() >= u128::from(*bound),
        AccessLogFilter::NotHealthCheck
        | AccessLogFilter::Cel(_)
        | AccessLogFilter::And(_)
        | AccessLogFilter::Or(_)
        | AccessLogFilter::Unsupported(_) => true,
    }
}

#[cfg(test)]
mod tests;
