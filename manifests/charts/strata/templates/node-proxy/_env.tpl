{{/* Environment of the node proxy: ztunnel's names. */}}
{{- define "strata.proxyEnv" -}}
- name: XDS_ADDRESS
  value: {{ include "strata.xdsAddress" . | quote }}
- name: CA_ADDRESS
  value: {{ .Values.mesh.caAddress | default (include "strata.xdsAddress" .) | quote }}
- name: XDS_ROOT_CA
  value: /var/run/secrets/istio/root-cert.pem
- name: AUTH_TOKEN
  value: /var/run/secrets/tokens/istio-token
{{- if .Values.mesh.crl.enabled }}
- name: CRL_PATH
  value: /var/run/secrets/istio/crl/ca-crl.pem
{{- end }}
- name: TRUST_DOMAIN
  value: {{ .Values.mesh.trustDomain | quote }}
- name: CLUSTER_ID
  value: {{ .Values.mesh.clusterId | quote }}
{{- if .Values.mesh.network }}
- name: NETWORK
  value: {{ .Values.mesh.network | quote }}
{{- end }}
- name: STRATA_CONCURRENCY
  value: {{ .Values.nodeProxy.concurrency | quote }}
- name: CONNECTION_TERMINATION_DEADLINE_SECONDS
  value: {{ .Values.nodeProxy.drainSeconds | quote }}
{{- range $name, $path := dict "INSTANCE_IP" "status.podIP" "NODE_NAME" "spec.nodeName" "POD_NAME" "metadata.name" "POD_NAMESPACE" "metadata.namespace" "SERVICE_ACCOUNT" "spec.serviceAccountName" }}
- name: {{ $name }}
  valueFrom:
    fieldRef:
      fieldPath: {{ $path }}
{{- end }}
{{- end }}
