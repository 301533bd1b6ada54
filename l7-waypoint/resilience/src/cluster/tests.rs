use std::time::Duration;

use super::*;

fn spec(hosts: Vec<HostSpec>) -> ClusterSpec {
    ClusterSpec {
        name: "c".into(),
        hosts,
        policy: LbPolicy::RoundRobin,
        panic_threshold: 0,
        locality_weighted: false,
        slow_start: None,
        outlier: None,
        limits: Limits::default(),
    }
}

fn hosts(count: usize) -> Vec<HostSpec> {
    (0..count).map(|index| HostSpec::new(format!("10.0.0.{index}:80"), 1)).collect()
}

fn pick(cluster: &Cluster, tried: &[usize], now: u64, rng: &mut Rng, cursor: &Cell<u64>) -> Option<usize> {
    cluster.pick(Pick { hash: None, rng, cursor, tried, attempts: 5, skip_priorities: 0, now })
}

fn counts(cluster: &Cluster, picks: usize, now: u64) -> Vec<usize> {
    let (mut rng, cursor) = (Rng::new(3), Cell::new(0));
    let mut counts = vec![0; cluster.spec().hosts.len()];
    for _ in 0..picks {
        counts[pick(cluster, &[], now, &mut rng, &cursor).unwrap()] += 1;
    }
    counts
}

#[test]
fn ejected_hosts_are_left_out_until_they_return() {
    let outlier = OutlierConfig { consecutive_5xx: Some(3), max_ejection_percent: 50, ..OutlierConfig::default() };
    let states = States::default();
    let cluster = Cluster::build(ClusterSpec { outlier: Some(outlier), ..spec(hosts(2)) }, &states, 0);
    assert!(!cluster.report(0, Outcome::Response(500), 10));
    assert!(!cluster.report(0, Outcome::LocalFailure, 10));
    assert!(cluster.report(0, Outcome::Response(503), 10));
    assert_eq!(counts(&cluster, 100, 20), [0, 100]);
    for _ in 0..10 {
        assert!(!cluster.report(1, Outcome::Response(500), 20), "half of the hosts are out already");
    }
    assert_eq!(counts(&cluster, 100, 30_010), [50, 50]);
    // The state outlives a new configuration.
    assert!(
        cluster.report(0, Outcome::Response(500), 31_000)
            | cluster.report(0, Outcome::Response(500), 31_000)
            | cluster.report(0, Outcome::Response(500), 31_000)
    );
    let rebuilt = Cluster::build(spec(hosts(3)), &states, 31_000);
    assert_eq!(counts(&rebuilt, 100, 31_001), [0, 50, 50]);
    assert_eq!(rebuilt.host(2).since(), 31_000);
}

#[test]
fn retries_go_to_other_hosts() {
    let cluster = Cluster::build(ClusterSpec { policy: LbPolicy::Random, ..spec(hosts(3)) }, &States::default(), 0);
    let (mut rng, cursor) = (Rng::new(3), Cell::new(0));
    let again = (0..1000).filter(|_| pick(&cluster, &[1], 0, &mut rng, &cursor) == Some(1)).count();
    assert!(again < 20, "five draws all hit the tried host once in 243: {again}");
}

#[test]
fn load_moves_to_the_next_priority_as_health_falls() {
    let mut both = hosts(8);
    for host in &mut both[4..] {
        host.priority = 1;
    }
    let cluster = Cluster::build(spec(both.clone()), &States::default(), 0);
    assert_eq!(counts(&cluster, 1000, 0)[4..].iter().sum::<usize>(), 0);
    for host in &mut both[..2] {
        host.health = Health::Unhealthy;
    }
    // Half of priority 0 is healthy: it takes 70 % (1.4 times a half).
    let cluster = Cluster::build(spec(both.clone()), &States::default(), 0);
    let next: usize = counts(&cluster, 10_000, 0)[4..].iter().sum();
    assert!((2_700..3_300).contains(&next), "{next}");
    for host in &mut both[..4] {
        host.health = Health::Draining;
    }
    let cluster = Cluster::build(spec(both), &States::default(), 0);
    assert_eq!(counts(&cluster, 1000, 0)[4..].iter().sum::<usize>(), 1000);
}

#[test]
fn without_panic_nothing_healthy_means_no_upstream() {
    let mut sick = hosts(3);
    for host in &mut sick {
        host.health = Health::Unhealthy;
    }
    let (mut rng, cursor) = (Rng::new(3), Cell::new(0));
    let cluster = Cluster::build(spec(sick.clone()), &States::default(), 0);
    assert_eq!(pick(&cluster, &[], 0, &mut rng, &cursor), None);
    let cluster = Cluster::build(ClusterSpec { panic_threshold: 50, ..spec(sick) }, &States::default(), 0);
    assert!(pick(&cluster, &[], 0, &mut rng, &cursor).is_some());
    let cluster = Cluster::build(spec(Vec::new()), &States::default(), 0);
    assert_eq!(pick(&cluster, &[], 0, &mut rng, &cursor), None);
}

#[test]
fn localities_share_by_weight() {
    let mut spread = hosts(4);
    for (index, host) in spread.iter_mut().enumerate() {
        host.locality = u32::from(index >= 1);
        host.locality_weight = if index >= 1 { 20 } else { 80 };
    }
    let cluster = Cluster::build(ClusterSpec { locality_weighted: true, ..spec(spread) }, &States::default(), 0);
    let counts = counts(&cluster, 10_000, 0);
    assert!((7_700..8_300).contains(&counts[0]), "{counts:?}");
}

#[test]
fn a_retry_can_leave_out_the_priority_that_failed() {
    let mut both = hosts(2);
    both[1].priority = 1;
    let cluster = Cluster::build(spec(both), &States::default(), 0);
    let (mut rng, cursor) = (Rng::new(3), Cell::new(0));
    let skip = cluster.priority_bit(0);
    let ask = |rng: &mut Rng, skip| {
        cluster.pick(Pick { hash: None, rng, cursor: &cursor, tried: &[], attempts: 1, skip_priorities: skip, now: 0 })
    };
    // Priority 1 has no load of its own, so leaving out priority 0 falls back to the usual loads.
    assert_eq!(ask(&mut rng, skip), Some(0));
    assert_eq!(ask(&mut rng, 0), Some(0));
}

#[test]
fn sticky_keys_stay_on_their_host() {
    let policy = LbPolicy::Maglev { table_size: 65537 };
    let outlier = OutlierConfig { interval: Duration::from_secs(1), ..OutlierConfig::default() };
    let cluster =
        Cluster::build(ClusterSpec { policy, outlier: Some(outlier), ..spec(hosts(5)) }, &States::default(), 0);
    let (mut rng, cursor) = (Rng::new(3), Cell::new(0));
    let mut ask = |hash| {
        cluster.pick(Pick { hash, rng: &mut rng, cursor: &cursor, tried: &[], attempts: 1, skip_priorities: 0, now: 0 })
    };
    let first = ask(Some(99));
    assert!((0..100).all(|_| ask(Some(99)) == first));
}
