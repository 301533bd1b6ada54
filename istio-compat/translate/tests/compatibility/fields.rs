//! The fields of the CRDs, as integration/scripts/crd-fields.py lists them.

/// One field.
#[derive(Debug, Clone)]
pub(crate) struct Field {
    pub(crate) kind: String,
    pub(crate) api_version: String,
    /// `spec.http[].match[].uri.exact`
    pub(crate) path: String,
    pub(crate) value_type: String,
    /// Allowed ones, if they are listed.
    pub(crate) values: Vec<String>,
}

impl Field {
    pub(crate) fn under(&self, prefix: &str) -> bool {
        self.path.starts_with(prefix)
    }
}

pub(crate) fn all() -> Vec<Field> {
    let (mut kind, mut api_version) = (String::new(), String::new());
    let mut fields = Vec::new();
    for line in include_str!("../data/crd-fields.txt").lines() {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match (line.starts_with(' '), words.as_slice()) {
            (false, [name, version]) => (kind, api_version) = (name.clone(), version.clone()),
            (true, [path, value_type, values @ ..]) => fields.push(Field {
                kind: kind.clone(),
                api_version: api_version.clone(),
                path: path.clone(),
                value_type: value_type.clone(),
                values: values.to_vec(),
            }),
            _ => panic!("crd-fields.txt: {line}"),
        }
    }
    fields
}
