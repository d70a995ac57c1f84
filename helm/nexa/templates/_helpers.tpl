{{/* The one name that all objects of a release share: a DNS label of at most 63 characters. */}}
{{- define "nexa.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* A name with a suffix, still within 63 characters: (list . "metrics"). */}}
{{- define "nexa.suffixed" -}}
{{- $suffix := index . 1 -}}
{{- $room := sub 62 (len $suffix) | int -}}
{{- printf "%s-%s" (include "nexa.fullname" (index . 0) | trunc $room | trimSuffix "-") $suffix -}}
{{- end -}}

{{- define "nexa.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "nexa.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "nexa.selectorLabels" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "nexa.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "nexa.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/component: operator
{{- end -}}

{{/* With those by which a Prometheus chooses its objects: (list . labels). */}}
{{- define "nexa.monitorLabels" -}}
{{- with index . 1 }}{{ toYaml . }}{{ "\n" }}{{ end }}
{{- include "nexa.labels" (index . 0) }}
{{- end -}}

{{/* What the operator may do to jobs and their children, wherever it looks. */}}
{{- define "nexa.rules" -}}
- apiGroups: [train.nexa.dev]
  resources: [nexatrainingjobs]
  verbs: [get, list, watch, patch, delete] # patch: a finalizer; both for jobs that ask for it
- apiGroups: [train.nexa.dev]
  resources: [nexatrainingjobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete] # patch: suspend
- apiGroups: [jobset.x-k8s.io]
  resources: [jobsets]
  verbs: [get, list, create, patch, delete] # not watched: pods and Jobs tell enough
- apiGroups: [kubeflow.org]
  resources: [pytorchjobs]
  verbs: [get, list, create, patch, delete]
- apiGroups: [kueue.x-k8s.io]
  resources: [workloads]
  verbs: [list] # why a job waits in its queue
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [services]
  verbs: [get, create]
- apiGroups: [""]
  resources: [events]
  verbs: [create, list] # list: why a controller makes no pods
{{- if not .Values.watchNamespace }}
- apiGroups: [""]
  resources: [nodes]
  verbs: [get] # what it says of itself, where a rank was lost
{{- end }}
{{- end -}}


{{/* The pods of every job. */}}
{{- define "nexa.trainers" -}}
matchExpressions:
  - {key: train.nexa.dev/job-uid, operator: Exists}
{{- end -}}

{{/* The operator's pods, for who lets them do what others may not: a job may put any label of theirs on its own pods, which
have this one besides, and nobody takes it off. */}}
{{- define "nexa.operators" -}}
matchLabels: {{- include "nexa.selectorLabels" . | nindent 2 }}
matchExpressions:
  - {key: train.nexa.dev/job-uid, operator: DoesNotExist}
{{- end -}}

{{/* A policy is an object of the cluster: releases for one namespace each must not share its name: (list . "jobs"). */}}
{{- define "nexa.policyName" -}}
{{- $root := index . 0 -}}
{{- include "nexa.suffixed" . -}}{{- with $root.Values.watchNamespace -}}.{{ . }}{{- end -}}
{{- end -}}

{{/* CEL: whether the variable `name` has an image run other code than what is in it. */}}
{{- define "nexa.runsOtherCode" -}}
['LD_', 'PYTHON', 'OPENSSL_', 'TRITON_', 'TORCHINDUCTOR_'].exists(prefix, name.startsWith(prefix))
|| name.matches('_PLUGIN$|_PLUGIN_PATH$|_INJECTION[0-9]*_PATH$|_MODULE_DIR$|_PROVIDER_PATH$')
|| name in ['PATH', 'HOME', 'ENV', 'BASH_ENV', 'GCONV_PATH', 'LOCPATH', 'CC', 'CXX', 'CUDA_HOME',
'CUDA_PATH', 'NCCL_CONF_FILE', 'TORCH_EXTENSIONS_DIR']
{{- end -}}

{{- define "nexa.otherCode" -}}
LD_*, PYTHON*, OPENSSL_*, PATH, HOME, CC, plugins and the like would have an allowed image run other code
{{- end -}}

{{/* CEL: what a trainer's pod must be, each with what is said where it is not. */}}
{{- define "nexa.harmless" -}}
{{- $containers := "(object.spec.containers + (has(object.spec.initContainers) ? object.spec.initContainers : []))" -}}
- expression: >-
    !(has(object.spec.hostNetwork) && object.spec.hostNetwork
    || has(object.spec.hostPID) && object.spec.hostPID || has(object.spec.hostIPC) && object.spec.hostIPC)
    && {{ $containers }}.all(one, !has(one.ports)
    || one.ports.all(port, !has(port.hostPort) || port.hostPort == 0))
  message: a trainer's pod uses no namespace and no port of its node
- expression: >-
    {{ $containers }}.all(one, !has(one.securityContext)
    || !(has(one.securityContext.privileged) && one.securityContext.privileged)
    && !(has(one.securityContext.capabilities) && has(one.securityContext.capabilities.add)))
  message: a trainer's container is not privileged and adds no capability
- expression: "!has(object.spec.volumes) || object.spec.volumes.all(volume, !has(volume.hostPath))"
  message: a trainer's pod mounts no path of its node
- expression: >-
    (!has(object.spec.serviceAccountName) || object.spec.serviceAccountName == 'default')
    && has(object.spec.automountServiceAccountToken) && !object.spec.automountServiceAccountToken
  message: a trainer's pod has no service account of its own and no token
{{- end -}}

{{/* CEL: whether any of these does not hold. */}}
{{- define "nexa.harmful" -}}
{{- $rules := list -}}
{{- range include "nexa.harmless" . | fromYamlArray -}}
{{- $rules = append $rules (printf "(%s)" .expression) -}}
{{- end -}}
!({{ join " && " $rules }})
{{- end -}}

{{/* Deny, in the namespaces that the operator looks after: (list . "jobs"). */}}
{{- define "nexa.binding" -}}
{{- $root := index . 0 -}}
policyName: {{ include "nexa.policyName" . }}
validationActions: [Deny]
{{- with $root.Values.watchNamespace }}
matchResources:
  namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: {{ . }}}}
{{- end }}
{{- end -}}
