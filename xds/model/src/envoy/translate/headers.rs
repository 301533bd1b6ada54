//! Header additions and removals.
use xds_proto::envoy::envoy::config::common::mutation_rules::v3 as rules;
use xds_proto::envoy::envoy::config::core::v3 as core;
use xds_proto::envoy::google::protobuf as wkt;

use super::report::{Refusable, Refusal};
use crate::envoy::route::{AppendAction, HeaderAdd, HeaderMutations};

/// One header to add.
pub(super) fn add(message: core::HeaderValueOption) -> Refusable<HeaderAdd> {
    use core::header_value_option::HeaderAppendAction as Wire;
    let core::HeaderValueOption { header, append, append_action, keep_empty_value } = message;
    let core::HeaderValue { key, value, raw_value } = header.unwrap_or_default();
    let format = if raw_value.is_empty() {
        value
    } else {
        String::from_utf8(raw_value).map_err(|_| Refusal::new(&key, "raw value is not UTF-8"))?
    };
    let action = match (append, Wire::try_from(append_action)) {
        // The obsolete field wins when it is there, as in Envoy.
        (Some(wkt::BoolValue { value: true }), _) | (None, Ok(Wire::AppendIfExistsOrAdd)) => {
            AppendAction::AppendIfExistsOrAdd
        }
        (Some(wkt::BoolValue { value: false }), _) | (None, Ok(Wire::OverwriteIfExistsOrAdd)) => {
            AppendAction::OverwriteIfExistsOrAdd
        }
        (None, Ok(Wire::AddIfAbsent)) => AppendAction::AddIfAbsent,
        (None, Ok(Wire::OverwriteIfExists)) => AppendAction::OverwriteIfExists,
        (None, Err(_)) => return Err(Refusal::new(&key, "unknown append action")),
    };
    Ok(HeaderAdd { name: key.to_ascii_lowercase(), format, action, keep_empty_value })
}

/// Additions and removals of one scope.
pub(super) fn mutations(add_list: Vec<core::HeaderValueOption>, remove: Vec<String>) -> Refusable<HeaderMutations> {
    let add = add_list.into_iter().map(add).collect::<Refusable<_>>()?;
    Ok(HeaderMutations { add, remove: remove.iter().map(|name| name.to_ascii_lowercase()).collect() })
}

/// The `header_mutation` filter's list. Its order between additions and removals must not matter.
pub(super) fn rules(list: Vec<rules::HeaderMutation>) -> Refusable<HeaderMutations> {
    use rules::header_mutation::Action;
    let mut out = HeaderMutations::default();
    for mutation in list {
        match mutation.action {
            Some(Action::Append(option)) => out.add.push(add(option)?),
            Some(Action::Remove(name)) => {
                let name = name.to_ascii_lowercase();
                if out.add.iter().any(|added| added.name == name) {
                    return Err(Refusal::new("remove", format!("{name} is added before it is removed")));
                }
                out.remove.push(name);
            }
            Some(Action::RemoveOnMatch(_)) => return Err(Refusal::new("remove_on_match", "not supported")),
            None => return Err(Refusal::new("action", "missing")),
        }
    }
    Ok(out)
}

/// Plain header values (no appending), as `ext_authz` lists them.
pub(super) fn plain(list: Vec<core::HeaderValue>) -> Refusable<Vec<HeaderAdd>> {
    list.into_iter()
        .map(|header| {
            add(core::HeaderValueOption {
                header: Some(header),
                append_action: core::header_value_option::HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
                ..core::HeaderValueOption::default()
            })
        })
        .collect()
}
