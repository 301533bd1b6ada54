// The part of Istio's node agent (istio-cni) that talks to ztunnel and captures pods, without a cluster around it: Istio's own
// socket server, cache, and rules. Pods that are there when it starts are its arguments, three each (UID NAME NETNS; a NETNS of -
// is one it does not find); it is told of others on standard input.
//
//	add UID NAME NETNS     a pod of namespace shop with account NAME joins the mesh
//	remove UID NAME        it leaves the mesh and runs on
//	delete UID NAME        it is gone
//
// NATIVE_NFTABLES=true has it write its rules by nftables, as the chart's value of that name does.
// Called istio-cni it would not work: by that name Istio's iptables code takes itself for the CNI plugin and closes descriptor 0.
// Each line is answered with "done" or "failed: WHY". What Istio does not export is reached by name: what is tested is that code,
// and only the API server that drives it is left out.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strings"
	"time"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"istio.io/istio/cni/pkg/config"
	"istio.io/istio/cni/pkg/iptables"
	"istio.io/istio/cni/pkg/nodeagent"
	"istio.io/istio/cni/pkg/trafficmanager"
	"istio.io/istio/pkg/zdsapi"
	"istio.io/istio/tools/istio-iptables/pkg/dependencies"
)

// How long istio-cni waits between looking whether ztunnel is still there.
const keepAlive = 5 * time.Second

//go:linkname newCache istio.io/istio/cni/pkg/nodeagent.newPodNetnsCache
func newCache(open func(path string) (nodeagent.NetnsCloser, error)) unsafe.Pointer

//go:linkname snapshot istio.io/istio/cni/pkg/nodeagent.(*podNetnsCache).ReadCurrentPodSnapshot
func snapshot(cache unsafe.Pointer) map[string]nodeagent.WorkloadInfo

//go:linkname newServer istio.io/istio/cni/pkg/nodeagent.newZtunnelServer
func newServer(path string, pods nodeagent.PodNetnsCache, keepAlive time.Duration) (unsafe.Pointer, error)

//go:linkname run istio.io/istio/cni/pkg/nodeagent.(*ztunnelServer).Run
func run(server unsafe.Pointer, ctx context.Context)

//go:linkname podAdded istio.io/istio/cni/pkg/nodeagent.(*ztunnelServer).PodAdded
func podAdded(server unsafe.Pointer, ctx context.Context, pod *corev1.Pod, netns nodeagent.Netns) error

//go:linkname podDeleted istio.io/istio/cni/pkg/nodeagent.(*ztunnelServer).PodDeleted
func podDeleted(server unsafe.Pointer, ctx context.Context, uid string) error

//go:linkname closeServer istio.io/istio/cni/pkg/nodeagent.(*ztunnelServer).Close
func closeServer(server unsafe.Pointer) error

//go:linkname newNet istio.io/istio/cni/pkg/nodeagent.newNetServer
func newNet(server nodeagent.ZtunnelServer, cache unsafe.Pointer, rules trafficmanager.TrafficRuleManager,
	finder nodeagent.PodNetnsFinder) *nodeagent.NetServer

type cache struct{ inner unsafe.Pointer }

func (c cache) ReadCurrentPodSnapshot() map[string]nodeagent.WorkloadInfo { return snapshot(c.inner) }

type server struct{ inner unsafe.Pointer }

func (s server) Run(ctx context.Context) { run(s.inner, ctx) }
func (s server) PodDeleted(ctx context.Context, uid string) error {
	return podDeleted(s.inner, ctx, uid)
}
func (s server) Close() error { return closeServer(s.inner) }
func (s server) PodAdded(ctx context.Context, pod *corev1.Pod, netns nodeagent.Netns) error {
	return podAdded(s.inner, ctx, pod, netns)
}

// Where the namespaces of pods are that were there first.
type finder map[types.UID]string

func (f finder) FindNetnsForPods(pods map[types.UID]*corev1.Pod) (nodeagent.PodToNetns, error) {
	found := nodeagent.PodToNetns{}
	for uid, pod := range pods {
		path, known := f[uid]
		if !known {
			continue
		}
		netns, err := nodeagent.OpenNetns(path)
		if err != nil {
			return nil, err
		}
		workload := &zdsapi.WorkloadInfo{Name: pod.Name, Namespace: pod.Namespace, ServiceAccount: pod.Spec.ServiceAccountName}
		found[string(uid)] = nodeagent.WorkloadInfo{Workload: workload, Netns: netns}
	}
	return found, nil
}

func pod(uid, name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(uid)},
		Spec:       corev1.PodSpec{ServiceAccountName: name},
	}
}

func main() {
	if len(os.Args) < 2 || len(os.Args)%3 != 2 {
		fail(fmt.Errorf("usage: istio-node-agent SOCKET [UID NAME NETNS]..."))
	}
	// As Istio's chart sets it: both families, DNS captured, rules reconciled.
	rules := &config.AmbientConfig{
		RedirectDNS:            true,
		EnableIPv6:             true,
		HostProbeSNATAddress:   nodeagent.HostProbeSNATIP,
		HostProbeV6SNATAddress: nodeagent.HostProbeSNATIPV6,
		Reconcile:              true,
	}
	_, inPod, err := trafficmanager.NewTrafficRuleManager(&trafficmanager.TrafficRuleManagerConfig{
		NativeNftables: os.Getenv("NATIVE_NFTABLES") == "true",
		HostConfig:     rules, PodConfig: rules, NlDeps: iptables.RealNlDeps(),
		// Which one it takes depends on rules the node has; here the node has none.
		HostDeps: &dependencies.RealDependencies{ForceIptablesBinary: "nft"},
		PodDeps:  &dependencies.RealDependencies{UsePodScopedXtablesLock: true, ForceIptablesBinary: "nft"},
	})
	if err != nil {
		fail(err)
	}
	pods := newCache(nodeagent.OpenNetns)
	inner, err := newServer(os.Args[1], cache{pods}, keepAlive)
	if err != nil {
		fail(err)
	}
	var there []*corev1.Pod
	found := finder{}
	for words := os.Args[2:]; len(words) > 0; words = words[3:] {
		there = append(there, pod(words[0], words[1]))
		if words[2] != "-" {
			found[types.UID(words[0])] = words[2]
		}
	}
	net := newNet(server{inner}, pods, inPod, found)
	if err := net.ConstructInitialSnapshot(there); err != nil {
		fail(err)
	}
	net.Start(context.Background())
	fmt.Println("listening")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		if err := obey(net, strings.Fields(lines.Text())); err != nil {
			fmt.Println("failed:", strings.ReplaceAll(err.Error(), "\n", " "))
		} else {
			fmt.Println("done")
		}
	}
	if err := lines.Err(); err != nil {
		fail(err)
	}
}

func obey(net *nodeagent.NetServer, words []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if len(words) < 3 {
		return fmt.Errorf("not understood: %q", words)
	}
	pod := pod(words[1], words[2])
	switch {
	case words[0] == "add" && len(words) == 4:
		return net.AddPodToMesh(ctx, pod, nil, words[3])
	case words[0] == "remove":
		return net.RemovePodFromMesh(ctx, pod, false)
	case words[0] == "delete":
		return net.RemovePodFromMesh(ctx, pod, true)
	}
	return fmt.Errorf("not understood: %q", words)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "istio-node-agent:", err)
	os.Exit(1)
}
