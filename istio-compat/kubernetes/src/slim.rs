//! An object as the API server sends it, cut down while it is decoded. No object can make decoding fail: what is wrong
//! with it is found when it is typed, and told of that one object.
use std::borrow::Cow;

use compat_objects::core::ObjectMeta;
use compat_objects::{Kind, ObjectKey};
use kube::core::DynamicResourceScope;
use serde::de::{DeserializeSeed as _, Deserializer};
use serde_json::Value;

use crate::keep::{finish, keep};

/// Which version of a kind is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Served {
    pub(crate) kind: Kind,
    pub(crate) version: &'static str,
}

/// `KIND`: number of the kind whose fields are kept; see [`keep`].
#[derive(Debug, Clone)]
pub(crate) struct Slim<const KIND: usize> {
    /// Name, namespace, uid and resource version: what kube's watcher needs.
    metadata: ObjectMeta,
    value: Value,
}

/// A decoded object on its way to the store.
#[derive(Debug, Clone)]
pub(crate) struct Raw {
    pub(crate) key: ObjectKey,
    pub(crate) uid: String,
    pub(crate) version: String,
    pub(crate) value: Value,
}

impl<const KIND: usize> Slim<KIND> {
    pub(crate) fn into_raw(self, kind: Kind) -> Raw {
        let mut value = self.value;
        finish(kind, &mut value);
        let key =
            ObjectKey::new(kind, self.metadata.namespace.unwrap_or_default(), self.metadata.name.unwrap_or_default());
        Raw {
            key,
            uid: self.metadata.uid.unwrap_or_default(),
            version: self.metadata.resource_version.unwrap_or_default(),
            value,
        }
    }
}

impl<'de, const KIND: usize> serde::Deserialize<'de> for Slim<KIND> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = keep(Kind::ALL[KIND]).deserialize(deserializer)?;
        let mut metadata = ObjectMeta::default();
        if let Some(found) = value.get_mut("metadata").and_then(Value::as_object_mut) {
            let text = |name: &str| found.get(name).and_then(Value::as_str).map(str::to_owned);
            metadata.name = text("name");
            metadata.namespace = text("namespace");
            metadata.uid = text("uid");
            metadata.resource_version = text("resourceVersion");
            // It changes with every heartbeat: an object is the same without it.
            found.remove("resourceVersion");
        }
        Ok(Slim { metadata, value })
    }
}

impl<const KIND: usize> kube::Resource for Slim<KIND> {
    type DynamicType = Served;
    type Scope = DynamicResourceScope;

    fn kind(served: &Served) -> Cow<'_, str> {
        served.kind.name().into()
    }

    fn group(served: &Served) -> Cow<'_, str> {
        served.kind.group().into()
    }

    fn version(served: &Served) -> Cow<'_, str> {
        served.version.into()
    }

    fn plural(served: &Served) -> Cow<'_, str> {
        served.kind.plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
