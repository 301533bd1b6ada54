//! Header changes, compiled.
use http::{HeaderMap, HeaderName, HeaderValue};
use xds_model::envoy::route::{AppendAction, HeaderMutations};

use crate::CompileError;
use crate::format::{Format, FormatContext};

/// Changes of one scope: removals first, then additions.
#[derive(Debug, Clone, Default)]
pub struct HeaderOps {
    remove: Box<[HeaderName]>,
    add: Box<[Add]>,
}

#[derive(Debug, Clone)]
struct Add {
    name: HeaderName,
    value: Value,
    action: AppendAction,
    keep_empty: bool,
}

#[derive(Debug, Clone)]
enum Value {
    /// Made once.
    Fixed(HeaderValue),
    Format(Format),
}

impl HeaderOps {
    /// Compiles.
    ///
    /// # Errors
    /// If a name is not one that may be changed (`host` and pseudo-headers may not), or a format is not understood.
    pub fn compile(config: &HeaderMutations) -> Result<Self, CompileError> {
        let name = |name: &str| match HeaderName::from_bytes(name.as_bytes()) {
            Ok(name) if name != http::header::HOST => Ok(name),
            _ => Err(CompileError::HeaderName(name.to_owned())),
        };
        let remove = config.remove.iter().map(|text| name(text)).collect::<Result<_, _>>()?;
        let add = config
            .add
            .iter()
            .map(|add| {
                let format = Format::parse(&add.format)?;
                let value = match format.literal() {
                    Some(text) => Value::Fixed(HeaderValue::from_str(text).map_err(|_| CompileError::Format {
                        format: add.format.clone(),
                        reason: "not a header value".to_owned(),
                    })?),
                    None => Value::Format(format),
                };
                Ok(Add { name: name(&add.name)?, value, action: add.action, keep_empty: add.keep_empty_value })
            })
            .collect::<Result<_, CompileError>>()?;
        Ok(Self { remove, add })
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }

    /// Applies. Empty values are not added unless they are to be kept; a formatted value that is no header value
    /// (a control character came in) is left out.
    pub fn apply(&self, headers: &mut HeaderMap, context: &FormatContext<'_>) {
        for name in &self.remove {
            headers.remove(name);
        }
        for add in &self.add {
            let value = match &add.value {
                Value::Fixed(value) => value.clone(),
                Value::Format(format) => match HeaderValue::from_str(&format.format(context)) {
                    Ok(value) => value,
                    Err(_) => continue,
                },
            };
            if value.is_empty() && !add.keep_empty {
                continue;
            }
            match add.action {
                AppendAction::AppendIfExistsOrAdd => {
                    headers.append(&add.name, value);
                }
                AppendAction::AddIfAbsent => {
                    if !headers.contains_key(&add.name) {
                        headers.insert(&add.name, value);
                    }
                }
                AppendAction::OverwriteIfExistsOrAdd => {
                    headers.insert(&add.name, value);
                }
                AppendAction::OverwriteIfExists => {
                    if headers.contains_key(&add.name) {
                        headers.insert(&add.name, value);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use xds_model::envoy::route::HeaderAdd;

    use super::*;

    fn add(name: &str, format: &str, action: AppendAction) -> HeaderAdd {
        HeaderAdd { name: name.to_owned(), format: format.to_owned(), action, keep_empty_value: false }
    }

    #[test]
    fn removals_come_first_and_actions_differ() {
        let config = HeaderMutations {
            remove: vec!["x-c".to_owned(), "x-set".to_owned()],
            add: vec![
                add("x-set", "1", AppendAction::OverwriteIfExistsOrAdd),
                add("x-old", "2", AppendAction::OverwriteIfExists),
                add("x-none", "2", AppendAction::OverwriteIfExists),
                add("x-old", "3", AppendAction::AppendIfExistsOrAdd),
                add("x-old", "4", AppendAction::AddIfAbsent),
                add("x-empty", "%RESP(x)%", AppendAction::AppendIfExistsOrAdd),
            ],
        };
        let mut headers = HeaderMap::new();
        for name in ["x-c", "x-set", "x-old"] {
            headers.insert(name, HeaderValue::from_static("0"));
        }
        HeaderOps::compile(&config).expect("compiles").apply(&mut headers, &FormatContext::default());
        let mut got: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}={}", value.to_str().unwrap())).collect();
        got.sort();
        assert_eq!(got, ["x-old=2", "x-old=3", "x-set=1"]);
    }

    #[test]
    fn host_and_pseudo_headers_are_refused() {
        for name in [":authority", "host", "x y"] {
            let config = HeaderMutations { add: vec![add(name, "1", AppendAction::AddIfAbsent)], remove: Vec::new() };
            assert_eq!(HeaderOps::compile(&config).unwrap_err(), CompileError::HeaderName(name.to_owned()));
        }
    }
}
