package meshprom

import (
	"errors"
	"maps"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/meshpresence/mesh"
)

// DefaultNamespace is the first part of the names of metrics if Options has none.
const DefaultNamespace = "mesh"

// Source provides the stats: a [mesh.Server] or a [mesh.PresenceManager]. Stats must be
// safe for concurrent use.
type Source interface {
	Stats() mesh.Stats
}

// Options set the names and labels of metrics. The zero value is fine for one server in a
// registry.
type Options struct {
	// Namespace begins the name of every metric, followed by an underscore. Defaults to
	// DefaultNamespace.
	Namespace string
	// ConstLabels are on every metric. They distinguish several servers of one process in
	// one registry: each server needs another value of the same label. The map is copied.
	// Defaults to none.
	ConstLabels prometheus.Labels
}

// Collector implements [prometheus.Collector]. It is safe for concurrent use and keeps no
// data between two collections.
type Collector struct {
	src     Source
	metrics []described
	invalid error // why nothing can be collected; nil if it can
}

// described is a metric under its full name.
type described struct {
	metric
	desc *prometheus.Desc
}

var _ prometheus.Collector = (*Collector)(nil)

// errNoSource is the error of registering a collector without a source.
var errNoSource = errors.New("meshprom: no source of stats")

// NewCollector returns a collector of src's stats. Register it with a
// [prometheus.Registerer]. One collection makes one call of Stats. If src is nil or the
// options are invalid, registering returns the error. That includes invalid names and
// labels. For a second collector with the same names and labels the registry returns its
// own [prometheus.AlreadyRegisteredError].
func NewCollector(src Source, opts Options) *Collector {
	if src == nil {
		return &Collector{invalid: errNoSource}
	}
	namespace := opts.Namespace
	if namespace == "" {
		namespace = DefaultNamespace
	}
	labels := maps.Clone(opts.ConstLabels)
	c := &Collector{src: src}
	for _, m := range table() {
		var names []string
		if m.label != "" {
			names = []string{m.label}
		}
		c.metrics = append(c.metrics, described{
			m, prometheus.NewDesc(prometheus.BuildFQName(namespace, "", m.name), m.help, names, labels),
		})
	}
	return c
}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(out chan<- *prometheus.Desc) {
	if c.invalid != nil {
		out <- prometheus.NewInvalidDesc(c.invalid)
		return
	}
	for _, m := range c.metrics {
		out <- m.desc
	}
}

// Collect implements [prometheus.Collector].
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	if c.invalid != nil {
		out <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(c.invalid), c.invalid)
		return
	}
	st := c.src.Stats()
	for _, m := range c.metrics {
		if m.label == "" {
			out <- m.sample(&st, "")
			continue
		}
		for _, value := range m.values {
			out <- m.sample(&st, value, value)
		}
	}
}

// sample returns one metric for a value of its label. labels is empty for a metric
// without label.
func (m described) sample(st *mesh.Stats, value string, labels ...string) prometheus.Metric {
	var (
		made prometheus.Metric
		err  error
	)
	if m.kind == histogram {
		h := m.spread(st, value)
		buckets := make(map[float64]uint64)
		for bound, n := range h.Buckets() {
			buckets[bound.Seconds()] = n
		}
		made, err = prometheus.NewConstHistogram(m.desc, h.Count(), h.Sum().Seconds(), buckets, labels...)
	} else {
		kind := prometheus.GaugeValue
		if m.kind == counter {
			kind = prometheus.CounterValue
		}
		made, err = prometheus.NewConstMetric(m.desc, kind, m.number(st, value), labels...)
	}
	if err != nil { // caused by the options, so that every sample fails
		return prometheus.NewInvalidMetric(m.desc, err)
	}
	return made
}
