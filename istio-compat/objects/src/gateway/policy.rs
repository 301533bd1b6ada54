//! `ReferenceGrant` and `BackendTLSPolicy`.
use std::collections::BTreeMap;

use serde::Deserialize;

use super::ObjectReference;

/// `ReferenceGrant.spec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReferenceGrantSpec {
    pub from: Vec<ReferenceGrantFrom>,
    pub to: Vec<ReferenceGrantTo>,
}

/// Who may refer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReferenceGrantFrom {
    pub group: String,
    pub kind: String,
    pub namespace: String,
}

/// To what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ReferenceGrantTo {
    pub group: String,
    pub kind: String,
    /// Absent: every object of the kind.
    pub name: Option<String>,
}

/// `BackendTLSPolicy.spec`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTlsPolicySpec {
    pub target_refs: Vec<LocalPolicyTargetReference>,
    pub validation: BackendTlsValidation,
    pub options: BTreeMap<String, String>,
}

/// An object of the policy's own namespace; `sectionName` is a port's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LocalPolicyTargetReference {
    pub group: String,
    pub kind: String,
    pub name: String,
    pub section_name: Option<String>,
}

/// How the backend proves who it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BackendTlsValidation {
    pub ca_certificate_refs: Vec<ObjectReference>,
    /// `System` is the only value.
    #[serde(rename = "wellKnownCACertificates")]
    pub well_known_ca_certificates: Option<String>,
    /// SNI, and the name to verify if `subjectAltNames` is empty.
    pub hostname: String,
    pub subject_alt_names: Vec<BackendSubjectAltName>,
}

/// A name the certificate must have.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendSubjectAltName {
    #[serde(rename = "type")]
    pub kind: SubjectAltNameType,
    #[serde(default)]
    pub hostname: Option<String>,
    #[serde(default)]
    pub uri: Option<String>,
}

/// Which member of a [`BackendSubjectAltName`] is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum SubjectAltNameType {
    Hostname,
    #[serde(rename = "URI")]
    Uri,
}
