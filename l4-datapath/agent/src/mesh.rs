//! Enrolment, listeners and short-cuts: carries out what [`crate::enrolment`] says.
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use compat_objects::ObjectSet;
use l4_cni::code;
use l4_cni::protocol::{AttachmentId, Failure, Response};
use l4_flow::Refusal;
use l4_loader::PodLookup;
use l4_netns::Capture;
use strata_abi::{Grant, GrantKey, ListenerKey, identity, listener, pod_flag};
use strata_handoff::message::ShortCut;
use strata_handoff::{AgentMessage, PodInfo, ProxyMessage};

use crate::agent::{Agent, Pod, Proxy, drain_deadline};
use crate::enrolment::{Event, Phase, Step};
use crate::handoff::ProxyEvent;
use crate::objects;
use crate::status::PodReport;

/// Brings what the objects say of a pod up to date.
pub(crate) fn describe(pod: &mut Pod, objects: &ObjectSet, node: &str, identity: Option<u32>) {
    let found = objects::described(objects, node, &pod.state.pod.namespace, &pod.state.pod.name);
    pod.described = found.is_some() && identity.is_some();
    pod.security_id = identity.filter(|_| pod.described).unwrap_or(identity::UNMANAGED);
    pod.flags = if found.is_some_and(objects::is_waypoint) { pod_flag::WAYPOINT } else { 0 };
    if let Some(found) = found {
        pod.state.service_account = Some(objects::service_account(found).to_owned());
    }
}

/// What is told of a pod.
pub(crate) fn report(pod: &Pod, objects: &ObjectSet) -> PodReport {
    let object = objects.pod(&pod.state.pod.namespace, &pod.state.pod.name);
    // A static pod's object has another uid than its sandbox. A successor's object is not this pod's to tell of.
    let object = object.filter(|object| crate::arrivals::is_the_pod(object, &pod.state.pod.uid));
    PodReport {
        namespace: pod.state.pod.namespace.clone(),
        name: pod.state.pod.name.clone(),
        uid: object.and_then(|object| object.metadata.uid.clone()).unwrap_or_default(),
        ips: pod.state.addresses().collect(),
        enrolled: pod.phase.is_enrolled(),
        problem: match &pod.phase {
            Phase::Failed { reason } => Some(reason.clone()),
            _ => pod.problem.clone(),
        },
    }
}

impl Agent {
    /// Enrols and un-enrols pods as the objects say.
    pub(crate) async fn sync_mesh(&mut self) {
        let mut changed = Vec::new();
        for (attachment, pod) in &mut self.pods {
            let described =
                objects::described(&self.objects, &self.node, &pod.state.pod.namespace, &pod.state.pod.name);
            let wanted = described.is_some_and(|object| objects::wants_mesh(&self.objects, object));
            // A pod whose device is not made yet is looked at again when it is.
            let undecided = pod.phase == Phase::Out && wanted && pod.state.ifindex != 0 && self.proxy.is_some();
            if pod.wanted != wanted || undecided {
                pod.wanted = wanted;
                changed.push((attachment.clone(), wanted));
            }
        }
        for (attachment, wanted) in changed {
            self.step(&attachment, Event::Wanted(wanted), Vec::new()).await;
        }
        self.renew_captures();
    }

    /// Each pod's capture program carries the pod's identity: a new one is loaded where that has changed.
    pub(crate) fn renew_captures(&mut self) {
        if !self.knows_objects {
            // Nobody's identity is known: what an earlier agent loaded is right.
            return;
        }
        let stale = |pod: &&Pod| pod.phase.is_enrolled() && pod.captured_as != Some(pod.security_id);
        let stale: Vec<AttachmentId> =
            self.pods.values().filter(stale).map(|pod| pod.state.attachment.clone()).collect();
        for attachment in stale {
            if let Err(error) = self.attach_capture(&attachment) {
                tracing::error!(%attachment, %error, "the pod's capture could not be renewed");
            }
        }
    }

    /// What only time brings: refused pods are tried again, waiting ADDs end, drained rules go.
    pub(crate) async fn retry_mesh(&mut self, retry_failed: bool) {
        let now = Instant::now();
        let failed: Vec<AttachmentId> = self
            .pods
            .iter()
            .filter(|(_, pod)| retry_failed && matches!(pod.phase, Phase::Failed { .. }))
            .map(|(id, _)| id.clone())
            .collect();
        for attachment in failed {
            self.step(&attachment, Event::Wanted(true), Vec::new()).await;
        }
        let late: Vec<AttachmentId> = self
            .pods
            .iter()
            .filter(|(_, pod)| pod.waiting.as_ref().is_some_and(|waiting| waiting.until <= now))
            .map(|(id, _)| id.clone())
            .collect();
        for attachment in late {
            self.fail_waiting(&attachment, "the proxy did not answer in time").await;
        }
        for pod in self.pods.values_mut() {
            if pod.rules_until.is_some_and(|until| until <= now) && !pod.phase.is_enrolled() {
                pod.rules_until = None;
                if let Err(error) = l4_netns::disable_capture(pod.netns.as_fd(), &capture_of(pod)).await {
                    tracing::warn!(attachment = %pod.state.attachment, %error, "rules of a pod that left the mesh stay");
                }
            }
        }
    }

    /// One event for one pod: next phase, steps, and what follows for a waiting ADD.
    async fn step(&mut self, attachment: &AttachmentId, event: Event, mut listeners: Vec<(u32, OwnedFd)>) {
        let mut events = std::collections::VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let proxy = self.proxy.is_some();
            let Some(pod) = self.pods.get_mut(attachment) else { return };
            let before = pod.phase.clone();
            let (next, steps) = pod.phase.next(event, pod.wanted, proxy);
            pod.phase = next;
            for step in steps {
                if let Some(follow) = self.carry_out(attachment, *step, &mut listeners).await {
                    events.push_back(follow);
                }
            }
            self.after_step(attachment, &before);
        }
        let failed = self.pods.get(attachment).and_then(|pod| match &pod.phase {
            Phase::Failed { reason } => Some(reason.clone()),
            _ => None,
        });
        match failed {
            Some(reason) => self.fail_waiting(attachment, &reason).await,
            None => self.finish_waiting(attachment),
        }
    }

    fn after_step(&mut self, attachment: &AttachmentId, before: &Phase) {
        let Some(pod) = self.pods.get_mut(attachment) else { return };
        if pod.phase == *before {
            return;
        }
        tracing::info!(uid = pod.state.uid(), phase = pod.phase.name(), "mesh");
        if pod.state.enrolled != pod.phase.is_enrolled() {
            pod.state.enrolled = pod.phase.is_enrolled();
            self.save_or_log();
        }
        self.write_status();
    }

    async fn carry_out(
        &mut self,
        attachment: &AttachmentId,
        step: Step,
        listeners: &mut Vec<(u32, OwnedFd)>,
    ) -> Option<Event> {
        match step {
            Step::Announce => self.announce(attachment),
            Step::Withdraw => {
                if let Some(uid) = self.pods.get(attachment).map(|pod| pod.state.uid()) {
                    self.send(AgentMessage::PodRemoved { uid }, None);
                }
            }
            Step::Capture => {
                return Some(match self.capture(attachment, std::mem::take(listeners)).await {
                    Ok(()) => Event::Captured,
                    Err(error) => {
                        tracing::error!(%attachment, error = format!("{error:#}"), "capture failed");
                        Event::Failed(format!("{error:#}"))
                    }
                });
            }
            Step::Release => self.release(attachment),
        }
        None
    }

    fn announce(&mut self, attachment: &AttachmentId) {
        let Some(pod) = self.pods.get(attachment) else { return };
        let name = &pod.state.pod;
        let object = objects::described(&self.objects, &self.node, &name.namespace, &name.name);
        let account = object.map(objects::service_account).or(pod.state.service_account.as_deref());
        let Some(account) = account.or(self.knows_objects.then_some("default")) else {
            tracing::warn!(uid = pod.state.uid(), "its service account is not known yet, the proxy is told later");
            self.held_back = true;
            return;
        };
        let info = PodInfo {
            uid: pod.state.uid(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            service_account: account.to_owned(),
            node: self.node.to_string(),
            ips: pod.state.addresses().collect(),
            pod_index: pod.state.pod_index,
        };
        let netns = pod.netns.clone();
        self.send(AgentMessage::PodAdded { pod: info }, Some(netns));
    }

    fn send(&mut self, message: AgentMessage, descriptor: Option<std::sync::Arc<OwnedFd>>) {
        let Some(proxy) = &self.proxy else { return };
        if let Err(error) = proxy.out.try_send((message, descriptor)) {
            tracing::error!(connection = proxy.connection, %error, "the proxy does not read; it must reconnect");
            // Dropping the sender ends the conversation; `Gone` follows.
            self.proxy = None;
        }
    }

    /// Listeners into the map, rules, sk_lookup, flag: in this order, so that nothing is steered to nobody.
    async fn capture(&mut self, attachment: &AttachmentId, listeners: Vec<(u32, OwnedFd)>) -> anyhow::Result<()> {
        let Some(pod) = self.pods.get_mut(attachment) else { anyhow::bail!("the pod is gone") };
        for kind in needed_kinds(pod) {
            anyhow::ensure!(
                listeners.iter().any(|(found, _)| *found == kind),
                "the proxy sent no listener of kind {kind}"
            );
        }
        for (kind, socket) in &listeners {
            let key = ListenerKey { pod_index: pod.state.pod_index, kind: *kind };
            self.datapath.maps().listeners.insert(key, socket.as_fd())?;
        }
        // The agent's own descriptors would keep the listeners open after the proxy's death.
        drop(listeners);
        if pod.phase.is_enrolled() {
            return Ok(());
        }
        pod.rules_until = None;
        l4_netns::enable_capture(pod.netns.as_fd(), &capture_of(pod)).await?;
        let index = pod.state.pod_index;
        self.attach_capture(attachment)?;
        let mut records = self.records();
        records.iter_mut().filter(|r| r.record.pod_index == index).for_each(|r| r.record.flags |= pod_flag::ENROLLED);
        self.tables.write_pods(self.datapath.maps(), &records)?;
        Ok(())
    }

    /// Attaches or renews the pod's own sk_lookup program.
    pub(crate) fn attach_capture(&mut self, attachment: &AttachmentId) -> Result<(), l4_loader::Error> {
        let Some(pod) = self.pods.get_mut(attachment) else { return Ok(()) };
        let lookup = PodLookup {
            pod_index: pod.state.pod_index,
            v4: pod.state.lease.v4,
            v6: pod.state.lease.v6,
            netns_cookie: pod.state.netns_cookie,
            security_id: pod.security_id,
        };
        self.datapath.attach_sk_lookup(&lookup, pod.netns.as_fd())?;
        pod.captured_as = Some(pod.security_id);
        Ok(())
    }

    /// The reverse of [`Agent::capture`]; the phase says already that the pod is out. Errors are logged: each step is
    /// worth doing without the others.
    fn release(&mut self, attachment: &AttachmentId) {
        self.write_status();
        let records = self.records();
        if let Err(error) = self.tables.write_pods(self.datapath.maps(), &records) {
            tracing::error!(%attachment, %error, "the pod's record could not be changed");
        }
        let Some(pod) = self.pods.get_mut(attachment) else { return };
        pod.captured_as = None;
        if let Err(error) = self.datapath.detach_sk_lookup(pod.state.pod_index) {
            tracing::error!(%attachment, %error, "the pod's capture program could not be detached");
        }
        if let Err(error) = self.datapath.maps().listeners.remove_pod(pod.state.pod_index) {
            tracing::error!(%attachment, %error, "the pod's listeners could not be removed");
        }
        // Connections the proxy still carries need the rules; new ones do not meet them.
        pod.rules_until = Some(drain_deadline());
    }

    /// Ends the capture of every pod for good: of new connections now, of open ones `after` a while, with the rules.
    pub(crate) async fn leave_mesh(&mut self, after: Duration) {
        let all: Vec<AttachmentId> = self.pods.keys().cloned().collect();
        for attachment in &all {
            if let Some(pod) = self.pods.get_mut(attachment) {
                pod.wanted = false;
                self.step(attachment, Event::Wanted(false), Vec::new()).await;
            }
        }
        if self.pods.values().any(|pod| pod.rules_until.is_some()) {
            tokio::time::sleep(after).await;
        }
        for (attachment, pod) in &mut self.pods {
            if pod.rules_until.take().is_some()
                && let Err(error) = l4_netns::disable_capture(pod.netns.as_fd(), &capture_of(pod)).await
            {
                tracing::error!(%attachment, %error, "rules of the pod could not be removed");
            }
        }
    }

    /// Tells the proxy that a removed pod is gone.
    pub(crate) fn withdraw(&mut self, pod: &Pod) {
        if matches!(pod.phase, Phase::Announced | Phase::Enrolled { announced: true }) {
            self.send(AgentMessage::PodRemoved { uid: pod.state.uid() }, None);
        }
    }

    fn finish_waiting(&mut self, attachment: &AttachmentId) {
        let Some(pod) = self.pods.get_mut(attachment) else { return };
        // Without a proxy it waits as well, until one comes or the time is over.
        if (pod.phase.is_enrolled() || !pod.wanted)
            && let Some(waiting) = pod.waiting.take()
        {
            let _plugin = waiting.reply.send(waiting.response);
        }
    }

    async fn fail_waiting(&mut self, attachment: &AttachmentId, reason: &str) {
        let Some(waiting) = self.pods.get_mut(attachment).and_then(|pod| pod.waiting.take()) else { return };
        self.remove_pod(attachment).await;
        if let Err(error) = self.reconcile() {
            tracing::error!(%error, "objects are not in force, the last good ones stay");
        }
        self.write_status();
        let failure = Failure::new(code::TRY_AGAIN_LATER, "the pod could not be brought into the mesh").because(reason);
        let _plugin = waiting.reply.send(Response::Failed(failure));
    }

    pub(crate) async fn proxy_event(&mut self, event: ProxyEvent) {
        match event {
            ProxyEvent::Connected { connection, pid, place, resolvers, out } => {
                tracing::info!(connection, pid, cgroup = place.cgroup, "proxy connected");
                if let Err(error) = self.admit(place) {
                    // Its own connections would be captured. Dropping `out` ends the conversation, and it tries again.
                    tracing::error!(connection, %error, "the proxy cannot be told from other processes");
                    return;
                }
                if let Some(earlier) = self.proxy.replace(Proxy { connection, pid, place, out }) {
                    self.retired.push(earlier);
                }
                self.revoke_all_grants();
                self.lead_queries(&resolvers);
                self.for_every_pod(Event::ProxyConnected).await;
                self.send(AgentMessage::SnapshotSent, None);
            }
            ProxyEvent::Message { connection, message, descriptors } => {
                let in_charge = self.proxy.as_ref().is_some_and(|proxy| proxy.connection == connection);
                self.proxy_message(in_charge, message, descriptors).await;
            }
            ProxyEvent::Gone { connection } => {
                self.retired.retain(|proxy| proxy.connection != connection);
                let in_charge = self.proxy.as_ref().is_none_or(|proxy| proxy.connection == connection);
                tracing::info!(connection, in_charge, "proxy disconnected");
                if in_charge {
                    self.proxy = None;
                    self.revoke_all_grants();
                    self.for_every_pod(Event::ProxyGone).await;
                }
                self.forget_gone_proxies(true);
            }
        }
    }

    /// Tells the proxy of all pods once their accounts are known, if it was not told of some.
    pub(crate) async fn announce_held_back(&mut self) {
        if std::mem::take(&mut self.held_back) && self.proxy.is_some() {
            self.for_every_pod(Event::ProxyConnected).await;
            self.send(AgentMessage::SnapshotSent, None);
        }
    }

    async fn for_every_pod(&mut self, event: Event) {
        let all: Vec<AttachmentId> = self.pods.keys().cloned().collect();
        for attachment in all {
            self.step(&attachment, event.clone(), Vec::new()).await;
        }
    }

    async fn proxy_message(&mut self, in_charge: bool, message: ProxyMessage, descriptors: Vec<OwnedFd>) {
        match message {
            ProxyMessage::Refused(refused) => self.reporter.refused(&Refusal {
                src: (refused.src, refused.src_port),
                dst: (refused.dst, refused.dst_port),
                policy: &refused.policy,
                reason: &refused.reason,
            }),
            // A proxy that drains beside its successor decides nothing any more.
            _ if !in_charge => {}
            ProxyMessage::Hello { .. } => tracing::warn!("the proxy said hello twice"),
            ProxyMessage::Listeners { uid, kinds } => {
                let Some(attachment) = self.attachment_of(&uid) else { return };
                if kinds.len() != descriptors.len() || kinds.iter().any(|kind| *kind >= listener::COUNT) {
                    tracing::error!(
                        uid,
                        ?kinds,
                        sockets = descriptors.len(),
                        "kinds and sockets of Listeners do not fit"
                    );
                    return;
                }
                let listeners = kinds.into_iter().zip(descriptors).collect();
                self.step(&attachment, Event::Listeners, listeners).await;
            }
            ProxyMessage::PodFailed { uid, error } => {
                tracing::error!(uid, error, "the proxy could not listen inside the pod");
                if let Some(attachment) = self.attachment_of(&uid) {
                    self.step(&attachment, Event::Failed(format!("proxy: {error}")), Vec::new()).await;
                }
            }
            ProxyMessage::Grant(short_cut) => self.grant(short_cut),
            ProxyMessage::Revoke(short_cut) => {
                if let Err(error) = self.datapath.maps().grants.remove(&grant_key(&short_cut)) {
                    tracing::error!(%error, "short-cut could not be revoked, all are");
                    self.revoke_all_grants();
                }
            }
            ProxyMessage::RevokeAll => self.revoke_all_grants(),
        }
    }

    fn attachment_of(&self, uid: &str) -> Option<AttachmentId> {
        self.pods.values().find(|pod| pod.state.uid() == uid).map(|pod| pod.state.attachment.clone())
    }

    fn grant(&self, short_cut: ShortCut) {
        let enrolled = |ip: IpAddr| {
            self.pods.values().any(|pod| pod.phase.is_enrolled() && pod.state.addresses().any(|address| address == ip))
        };
        if !enrolled(short_cut.src) || !enrolled(short_cut.dst) {
            tracing::warn!(?short_cut, "short-cut ignored: both ends must be enrolled pods of this node");
            return;
        }
        let maps = self.datapath.maps();
        let granted = maps.config.get().and_then(|config| {
            maps.grants.insert(&grant_key(&short_cut), &Grant { generation: config.grant_generation })
        });
        if let Err(error) = granted {
            tracing::error!(?short_cut, %error, "short-cut could not be granted");
        }
    }

    /// A removed pod's address may be another's soon: nothing granted to it may stay.
    pub(crate) fn revoke_grants_of(&self, pod: &Pod) {
        let maps = self.datapath.maps();
        let addresses: Vec<strata_abi::Addr> = pod.state.addresses().map(Into::into).collect();
        let revoked = maps.grants.keys().and_then(|keys| {
            let theirs = keys.iter().filter(|key| addresses.contains(&key.src) || addresses.contains(&key.dst));
            theirs.into_iter().try_for_each(|key| maps.grants.remove(key).map(drop))
        });
        if let Err(error) = revoked {
            tracing::error!(%error, "short-cuts of a removed pod could not be revoked, all are");
            self.revoke_all_grants();
        }
    }

    /// Raising the generation ends every short-cut at once; clearing the map only frees memory.
    fn revoke_all_grants(&self) {
        let maps = self.datapath.maps();
        if let Err(error) = maps.config.update(|config| config.grant_generation += 1) {
            tracing::error!(%error, "short-cuts could not be revoked");
        }
        if let Err(error) = maps.grants.clear() {
            tracing::error!(%error, "short-cuts could not be removed");
        }
    }
}

fn capture_of(pod: &Pod) -> Capture {
    Capture { v4: pod.state.lease.v4, v6: pod.state.lease.v6 }
}

/// Kinds of listeners a pod must have, by its families.
fn needed_kinds(pod: &Pod) -> impl Iterator<Item = u32> + use<> {
    let v4 = [listener::OUTBOUND_V4, listener::INBOUND_V4, listener::HBONE_V4];
    let v6 = [listener::OUTBOUND_V6, listener::INBOUND_V6, listener::HBONE_V6];
    let v4 = pod.state.lease.v4.map(|_| v4).into_iter().flatten();
    v4.chain(pod.state.lease.v6.map(|_| v6).into_iter().flatten())
}

fn grant_key(short_cut: &ShortCut) -> GrantKey {
    GrantKey { src: short_cut.src.into(), dst: short_cut.dst.into(), port: short_cut.port, _pad: 0 }
}
