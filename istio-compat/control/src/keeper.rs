//! Keeps what last worked: an object that an edit broke stays in force as it was.
use std::collections::BTreeSet;

use compat_objects::ObjectSet;
use compat_translate::{MeshOptions, MeshOutput, ObjectKey, Severity, TranslationFault, translate};

/// Translates, with a memory of the last good objects.
#[derive(Default)]
pub(crate) struct Keeper {
    /// Every object as it was when it last gave no error.
    good: ObjectSet,
}

impl Keeper {
    /// Translates `objects`; those in error are replaced by their last good version if there is one. All faults of
    /// the objects as written are in the output, whichever version is in force.
    pub(crate) fn translate(&mut self, objects: &ObjectSet, options: &MeshOptions) -> MeshOutput {
        let output = translate(objects, options);
        let broken = errors(&output.faults);
        if broken.is_empty() {
            self.good = objects.clone();
            return output;
        }
        let mut in_force = objects.clone();
        let mut good = objects.clone();
        let mut replaced = false;
        for key in &broken {
            match (self.good.get(key), objects.get(key)) {
                (Some(old), Some(new)) => {
                    if !old.same(new) {
                        in_force.insert(old.clone(), self.good.location(key).cloned());
                        replaced = true;
                    }
                    good.insert(old.clone(), self.good.location(key).cloned());
                }
                _ => {
                    good.remove(key);
                }
            }
        }
        self.good = good;
        if !replaced {
            return output;
        }
        let mut second = translate(&in_force, options);
        let mut faults = output.faults;
        for fault in std::mem::take(&mut second.faults) {
            if !faults.contains(&fault) && !broken.contains(&fault.key) {
                faults.push(fault);
            }
        }
        second.faults = faults;
        second.statuses = output.statuses;
        // Keys and objects that were asked for are fetched on, or it could never come into force.
        second.jwks_uris.extend(output.jwks_uris);
        second.referred.extend(output.referred);
        second
    }
}

fn errors(faults: &[TranslationFault]) -> BTreeSet<ObjectKey> {
    faults.iter().filter(|f| f.fault.severity == Severity::Error).map(|f| f.key.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use compat_objects::source::DirectorySource;

    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec: {clusterIP: 10.0.0.1, selector: {app: a}, ports: [{name: http, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: w}}
";

    fn route(host: &str, status: u32) -> String {
        format!(
            "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: a, namespace: shop}}
spec: {{hosts: [a], http: [{{match: [{{uri: {{exact: /x}}}}], directResponse: {{status: {status}}}}}, {{route: [{{destination: {{host: {host}}}}}]}}]}}
"
        )
    }

    fn translated(keeper: &mut Keeper, folder: &std::path::Path, route: &str) -> MeshOutput {
        std::fs::write(folder.join("all.yaml"), format!("{SERVICE}---{route}")).unwrap();
        let snapshot = DirectorySource::new(vec![folder.to_owned()]).load();
        keeper.translate(&snapshot.objects, &MeshOptions::default())
    }

    #[test]
    fn a_broken_edit_leaves_the_last_good_version_in_force_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut keeper = Keeper::default();
        let good = translated(&mut keeper, folder.path(), &route("a", 200));
        assert!(good.faults.is_empty(), "{:?}", good.faults);
        for _ in 0..2 {
            let broken = translated(&mut keeper, folder.path(), &route("missing", 201));
            assert_eq!(broken.waypoints, good.waypoints);
            assert!(
                broken.faults[0].to_string().contains("VirtualService shop/a: spec.http[1].route[0].destination.host")
            );
        }
        let corrected = translated(&mut keeper, folder.path(), &route("a", 202));
        assert_ne!(corrected.waypoints, good.waypoints);
        assert!(corrected.faults.is_empty());
    }
}
