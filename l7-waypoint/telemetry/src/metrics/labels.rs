//! Names and values of Istio's labels, in Istio's order.
use std::borrow::Cow;
use std::sync::Arc;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::record::Record;

/// One label.
pub(super) type Label = (Cow<'static, str>, Arc<str>);

/// Those of one time series; cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Labels(Arc<[Label]>);

impl FromIterator<Label> for Labels {
    fn from_iter<I: IntoIterator<Item = Label>>(labels: I) -> Self {
        Self(labels.into_iter().collect())
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.iter().try_for_each(|(name, value)| (&**name, &**value).encode(encoder.encode_label()))
    }
}

impl Labels {
    /// Istio's own for a request or a connection.
    pub(super) fn standard(record: &Record<'_>) -> Self {
        let (source, destination, service) = (record.source, record.destination, record.service);
        let is_tcp = record.method.is_none();
        let protocol = match (is_tcp, record.grpc) {
            (true, _) => "tcp",
            (false, true) => "grpc",
            (false, false) => "http",
        };
        let mut labels: Vec<(&'static str, Arc<str>)> = vec![
            ("reporter", "waypoint".into()),
            ("source_workload", source.workload.clone()),
            ("source_canonical_service", source.canonical_service.clone()),
            ("source_canonical_revision", source.canonical_revision.clone()),
            ("source_workload_namespace", source.namespace.clone()),
            ("source_principal", record.peer_principal.map_or_else(|| source.principal.clone(), Arc::from)),
            ("source_app", source.app.clone()),
            ("source_version", source.version.clone()),
            ("source_cluster", source.cluster.clone()),
            ("destination_workload", destination.workload.clone()),
            ("destination_workload_namespace", destination.namespace.clone()),
            ("destination_principal", destination.principal.clone()),
            ("destination_app", destination.app.clone()),
            ("destination_version", destination.version.clone()),
            ("destination_service", service.host.clone()),
            ("destination_canonical_service", destination.canonical_service.clone()),
            ("destination_canonical_revision", destination.canonical_revision.clone()),
            ("destination_service_name", service.name.clone()),
            ("destination_service_namespace", service.namespace.clone()),
            ("destination_cluster", destination.cluster.clone()),
            ("request_protocol", protocol.into()),
        ];
        if !is_tcp {
            let grpc = record.grpc_status.filter(|_| record.grpc);
            labels.push(("response_code", record.status.to_string().into()));
            labels.push(("grpc_response_status", grpc.map_or_else(String::new, |code| code.to_string()).into()));
        }
        labels.push(("response_flags", record.flags.to_string().into()));
        labels.push(("connection_security_policy", record.security.label().into()));
        labels.into_iter().map(|(name, value)| (name.into(), value)).collect()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Label> {
        self.0.iter()
    }
}
