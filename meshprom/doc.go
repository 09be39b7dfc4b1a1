// Package meshprom exports the [mesh.Stats] of servers to Prometheus.
//
//	reg := prometheus.NewRegistry()
//	reg.MustRegister(meshprom.NewCollector(srv, meshprom.Options{}))
//	http.Handle("/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
//
// README.md has the table of all metrics, and alerts to begin with. Names follow the
// conventions of Prometheus: seconds and bytes, and counters end in _total. Labels have
// fixed values. All of them exist from the start with 0, so that rate() and increase()
// count the first event. The package has no global state, and no label holds a value that
// a client chose.
//
// The package is a module of its own, so that only programs that import it depend on the
// client library of Prometheus.
package meshprom
