{{/* Names are fixed: istiod and istioctl look for `ztunnel`, and a cluster has one Strata. */}}
{{- define "strata.agent" -}}strata-agent{{- end }}
{{- define "strata.nodeProxy" -}}ztunnel{{- end }}
{{- define "strata.control" -}}strata-control{{- end }}

{{/* Labels of every object. Call with (list $ NAME COMPONENT). */}}
{{- define "strata.labels" -}}
{{- $root := index . 0 -}}
{{ include "strata.selector" . }}
app.kubernetes.io/component: {{ index . 2 }}
app.kubernetes.io/part-of: strata
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end }}

{{/* Labels of pods: without versions, so that a new chart with the same images replaces no pod. */}}
{{- define "strata.podLabels" -}}
{{ include "strata.selector" . }}
app.kubernetes.io/component: {{ index . 2 }}
app.kubernetes.io/part-of: strata
{{- end }}

{{/* Labels that never change. */}}
{{- define "strata.selector" -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
{{- end }}

{{/* An image: call with (list $ .Values.COMPONENT.image). */}}
{{- define "strata.image" -}}
{{- $image := index . 1 -}}
{{- $tag := $image.tag | default (index . 0).Chart.AppVersion -}}
{{- $registry := trimSuffix "/" $image.registry -}}
{{- if $registry -}}{{ $registry }}/{{- end -}}{{ $image.repository }}:{{ $tag }}
{{- end }}

{{- define "strata.pullSecrets" -}}
imagePullSecrets:
  {{- range .Values.imagePullSecrets }}
  - name: {{ . }}
  {{- end }}
{{- end }}

{{/* Environment of every process. */}}
{{- define "strata.logEnv" -}}
- name: RUST_LOG
  value: {{ .Values.log.level | quote }}
{{- if eq .Values.log.format "json" }}
- name: LOG_FORMAT
  value: json
{{- end }}
{{- end }}

{{/* The control plane's address. */}}
{{- define "strata.xdsAddress" -}}
{{- $own := eq .Values.profile.controlPlane "embedded" -}}
{{- $revision := ternary (printf "-%s" .Values.mesh.revision) "" (ne .Values.mesh.revision "") -}}
{{- $istiod := printf "istiod%s.%s" $revision .Values.mesh.istioNamespace -}}
{{- $control := printf "%s.%s" (include "strata.control" .) .Release.Namespace -}}
{{- .Values.mesh.xdsAddress | default (printf "https://%s.svc:15012" (ternary $control $istiod $own)) -}}
{{- end }}

{{/* Values a scheduler reads: call with .Values.COMPONENT. */}}
{{- define "strata.scheduling" -}}
nodeSelector:
  kubernetes.io/os: linux
  {{- with .nodeSelector }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
