package meshprom_test

import (
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshprom"
)

// This example serves a server's stats on /metrics. The registry may hold other metrics
// of the app too.
func Example() {
	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	defer client.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: client})
	if err != nil {
		log.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	reg.MustRegister(meshprom.NewCollector(srv, meshprom.Options{}))
	mux := http.NewServeMux()
	mux.Handle("/ws", srv)
	mux.Handle("/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))

	scrape := httptest.NewRecorder()
	mux.ServeHTTP(scrape, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(scrape.Body.String()) {
		if strings.HasPrefix(line, "mesh_leaves_total") {
			fmt.Print(line)
		}
	}
	// Output:
	// mesh_leaves_total{cause="closed"} 0
	// mesh_leaves_total{cause="expired"} 0
	// mesh_leaves_total{cause="left"} 0
	// mesh_leaves_total{cause="server_lost"} 0
	// mesh_leaves_total{cause="silent"} 0
}

// A label distinguishes two servers of one process in one registry.
func ExampleNewCollector_severalServers() {
	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	defer client.Close()
	reg := prometheus.NewRegistry()
	for _, name := range []string{"chat", "documents"} {
		srv, err := mesh.NewServer(mesh.Options{Redis: client, Prefix: name + ":"})
		if err != nil {
			log.Fatal(err)
		}
		reg.MustRegister(meshprom.NewCollector(srv, meshprom.Options{ConstLabels: prometheus.Labels{"server": name}}))
	}
	families, err := reg.Gather()
	if err != nil {
		log.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == "mesh_connections" {
			fmt.Println(len(family.GetMetric()), "servers")
		}
	}
	// Output: 2 servers
}
