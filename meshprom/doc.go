// Package meshprom shows the [mesh.Stats] of servers to Prometheus.
//
//	reg := prometheus.NewRegistry()
//	reg.MustRegister(meshprom.NewCollector(srv, meshprom.Options{}))
//	http.Handle("/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
//
// The table of all metrics, and alerts to begin with, are in README.md. Names
// follow Prometheus's conventions: seconds and bytes, counters end in _total.
// Labels have fixed values, all of which are there from the start with 0, so
// that rate() and increase() see the first event. Nothing here is global, and
// no label holds anything that a client chose.
//
// It is a module of its own: who does not import it does not get Prometheus's
// client library either.
package meshprom
