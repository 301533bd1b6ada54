//! The lab leaves nothing behind, whatever happens to it, and works again.
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use strata_integration::{repository, shop};
use strata_lab::{Lab, LabError, Options, traces};

#[test]
fn an_ended_lab_leaves_nothing() {
    let shop = shop();
    let id = shop.lab.id().to_owned();
    assert!(traces(&id).unwrap().len() > 10, "a running lab is found by its name");
    drop(shop);
    assert_eq!(traces(&id).unwrap(), Vec::<PathBuf>::new());
}

fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(60), "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_killed_lab_leaves_nothing_and_can_be_started_again() {
    let id = format!("k{}", std::process::id());
    for _ in 0..2 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hold-lab"));
        let mut holder = command.arg(&id).stdout(Stdio::null()).spawn().expect("hold-lab starts");
        let pod = format!("/run/netns/strata-{id}-pod-shop-waypoint-1");
        wait("the lab's last pod", || Path::new(&pod).exists());
        holder.kill().expect("kill -9");
        holder.wait().expect("its end");
        wait("the watcher to clean up", || traces(&id).unwrap().is_empty());
    }
}

#[test]
fn a_name_is_used_once() {
    let shop = shop();
    let again = Lab::start(Options::new(shop.lab.id(), repository().join("manifests/samples/shop")));
    assert!(matches!(again, Err(LabError::Taken(id)) if id == shop.lab.id()));
    // Ready pods become endpoints a moment later.
    let served = || shop.lab.call("shop/frontend-1", &["http://10.96.1.11/"]).is_ok_and(|call| call.ok == 1);
    shop.lab.wait_until("the first one to go on undisturbed", Duration::from_secs(10), served).unwrap();
}

#[test]
fn a_folder_with_a_mistake_is_refused_by_name_and_leaves_nothing() {
    let folder = repository().join("target/test-dumps").join(format!("broken-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: b}\nspec: {ports: [{port: eighty}]}\n";
    std::fs::write(folder.join("service.yaml"), text).unwrap();
    let id = format!("b{}", std::process::id());
    let error = Lab::start(Options::new(&*id, &folder)).err().expect("a refusal").to_string();
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(error.contains("service.yaml") && error.contains("port") && error.contains("b/a"), "{error}");
    assert_eq!(traces(&id).unwrap(), Vec::<PathBuf>::new());
}
