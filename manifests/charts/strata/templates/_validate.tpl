{{/* Refuses values that contradict each other, by name and with the reason. Types and names are the schema's matter. */}}
{{- define "strata.validate" -}}
{{- $plane := .Values.profile.controlPlane -}}
{{- $application := .Values.layers.application -}}
{{- if and $application (eq $plane "none") -}}
  {{- fail "profile.controlPlane is none and layers.application is true: the node proxy gets its configuration and certificates from a control plane. Set profile.controlPlane: istiod, or layers.application: false for the lower layer alone." -}}
{{- end -}}
{{- if and (not $application) (ne $plane "none") -}}
  {{- fail (printf "layers.application is false and profile.controlPlane is %s: without the upper layer nothing talks to a control plane. Set profile.controlPlane: none." $plane) -}}
{{- end -}}
{{- $host := .Values.k8sServiceHost -}}
{{- $port := toString .Values.k8sServicePort -}}
{{- if ne (empty $host) (empty $port) -}}
  {{- fail "k8sServiceHost and k8sServicePort go together: give both, or neither for the Service `kubernetes`." -}}
{{- end -}}
{{- if regexMatch "(^kubernetes(\\.|$))|(\\.svc(\\.|$))" $host -}}
  {{- fail (printf "k8sServiceHost is %s, a Service: it must be reachable before Services work. Give the address the kubelets use." $host) -}}
{{- end -}}
{{- if regexMatch "[/]|^https?:" $host -}}
  {{- fail (printf "k8sServiceHost is %s: give a bare address or name, without scheme or path." $host) -}}
{{- end -}}
{{- if and .Values.outside.masquerade (eq .Values.cni.mode "chained") -}}
  {{- fail "outside.masquerade is true and cni.mode is chained: the CNI that gives pods their addresses does that. Set outside.masquerade: false (the profiles chained-* do)." -}}
{{- end -}}
{{- if and .Values.outside.masqueradeExcept (not .Values.outside.masquerade) -}}
  {{- fail "outside.masqueradeExcept is given and outside.masquerade is false: nothing is masqueraded that could be excepted." -}}
{{- end -}}
{{- if $application -}}
  {{- include "strata.validateMesh" . -}}
{{- end -}}
{{- if eq (int .Values.agent.adminPort) (int .Values.agent.metricsPort) -}}
  {{- fail (printf "agent.adminPort and agent.metricsPort are both %d: they are two ports of one process." (int .Values.agent.adminPort)) -}}
{{- end -}}
{{- if has (toString .Values.agent.updateStrategy.maxUnavailable) (list "0" "0%") -}}
  {{- fail "agent.updateStrategy.maxUnavailable is 0: there is one agent a node, so an old one must go before the new one comes. Traffic goes on meanwhile." -}}
{{- end -}}
{{- end }}

{{- define "strata.validateMesh" -}}
{{- $mesh := .Values.mesh -}}
{{- $embedded := eq .Values.profile.controlPlane "embedded" -}}
{{- if and $embedded (or $mesh.xdsAddress $mesh.caAddress $mesh.revision) -}}
  {{- fail "profile.controlPlane is embedded: mesh.xdsAddress, mesh.caAddress and mesh.revision name another control plane. Remove them, or set profile.controlPlane: istiod." -}}
{{- end -}}
{{- if and (not $embedded) (ne .Release.Namespace $mesh.trustedNamespace) -}}
  {{- fail (printf "the release's namespace is %s and mesh.trustedNamespace is %s: istiod issues certificates only to the account ztunnel of the namespace it trusts. Install with --namespace %s, or set istiod's trustedZtunnelNamespace and mesh.trustedNamespace to %s." .Release.Namespace $mesh.trustedNamespace $mesh.trustedNamespace .Release.Namespace) -}}
{{- end -}}
{{- if and $mesh.xdsAddress $mesh.revision -}}
  {{- fail "mesh.revision only makes up the default address: it has no effect with mesh.xdsAddress. Remove one." -}}
{{- end -}}
{{- range $name := list "xdsAddress" "caAddress" -}}
  {{- $address := get $mesh $name -}}
  {{- if and $address (not (hasPrefix "https://" $address)) -}}
    {{- fail (printf "mesh.%s is %s: the token must not travel in plaintext, write https://HOST:PORT." $name $address) -}}
  {{- end -}}
{{- end -}}
{{- $proxy := .Values.nodeProxy -}}
{{- if le (int $proxy.terminationGracePeriodSeconds) (int $proxy.drainSeconds) -}}
  {{- fail (printf "nodeProxy.terminationGracePeriodSeconds is %d and nodeProxy.drainSeconds is %d: the kubelet would kill the proxy before it has drained." (int $proxy.terminationGracePeriodSeconds) (int $proxy.drainSeconds)) -}}
{{- end -}}
{{- $strategy := $proxy.updateStrategy -}}
{{- if and (has (toString $strategy.maxSurge) (list "0" "0%")) (has (toString $strategy.maxUnavailable) (list "0" "0%")) -}}
  {{- fail "nodeProxy.updateStrategy: maxSurge and maxUnavailable are both 0, so no proxy could ever be replaced." -}}
{{- end -}}
{{- end }}
