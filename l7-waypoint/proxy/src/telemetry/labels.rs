//! The label set of `istio_tcp_*` (xds-contract 7.1). Values are shared, so that making a set copies no text.
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use xds_model::wds::Workload;

use super::{Report, Reporter};

/// A label's text.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Text {
    Shared(Arc<str>),
    Static(&'static str),
}

impl EncodeLabelValue for Text {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        use std::fmt::Write;
        encoder.write_str(match self {
            Text::Shared(text) => text,
            Text::Static(text) => text,
        })
    }
}

const UNKNOWN: Text = Text::Static("unknown");

fn text(value: Option<&Arc<str>>) -> Text {
    match value {
        Some(value) if !value.is_empty() => Text::Shared(value.clone()),
        _ => UNKNOWN,
    }
}

/// Labels in ztunnel's order.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct TcpLabels {
    reporter: Text,
    source_workload: Text,
    source_canonical_service: Text,
    source_canonical_revision: Text,
    source_workload_namespace: Text,
    source_principal: Text,
    source_app: Text,
    source_version: Text,
    source_cluster: Text,
    destination_service: Text,
    destination_service_namespace: Text,
    destination_service_name: Text,
    destination_workload: Text,
    destination_canonical_service: Text,
    destination_canonical_revision: Text,
    destination_workload_namespace: Text,
    destination_principal: Text,
    destination_app: Text,
    destination_version: Text,
    destination_cluster: Text,
    request_protocol: Text,
    response_flags: Text,
    connection_security_policy: Text,
}

impl TcpLabels {
    pub(crate) fn new(report: &Report, flag: &'static str) -> TcpLabels {
        let (source, destination) = (report.source.as_deref(), report.destination.as_deref());
        let of = |workload: Option<&Workload>, field: fn(&Workload) -> &Arc<str>| text(workload.map(field));
        let service = report.service.as_deref();
        TcpLabels {
            reporter: Text::Static(match report.reporter {
                Reporter::Source => "source",
                Reporter::Destination => "destination",
            }),
            source_workload: of(source, |w| &w.workload_name),
            source_canonical_service: of(source, |w| &w.canonical_name),
            source_canonical_revision: of(source, |w| &w.canonical_revision),
            source_workload_namespace: of(source, |w| &w.namespace),
            source_principal: report.source_identity.as_ref().map_or(UNKNOWN, |id| Text::Shared(id.shared())),
            source_app: of(source, |w| &w.canonical_name),
            source_version: of(source, |w| &w.canonical_revision),
            source_cluster: of(source, |w| &w.cluster_id),
            destination_service: text(service.map(|s| &s.hostname)),
            destination_service_namespace: text(service.map(|s| &s.namespace)),
            destination_service_name: text(service.map(|s| &s.name)),
            destination_workload: of(destination, |w| &w.workload_name),
            destination_canonical_service: of(destination, |w| &w.canonical_name),
            destination_canonical_revision: of(destination, |w| &w.canonical_revision),
            destination_workload_namespace: of(destination, |w| &w.namespace),
            destination_principal: report.destination_identity.as_ref().map_or(UNKNOWN, |id| Text::Shared(id.shared())),
            destination_app: of(destination, |w| &w.canonical_name),
            destination_version: of(destination, |w| &w.canonical_revision),
            destination_cluster: of(destination, |w| &w.cluster_id),
            request_protocol: Text::Static("tcp"),
            response_flags: Text::Static(flag),
            connection_security_policy: Text::Static(report.security.as_str()),
        }
    }

    pub(crate) fn set_flag(&mut self, flag: &'static str) {
        self.response_flags = Text::Static(flag);
    }
}
