package meshprom

import (
	"errors"
	"flag"
	"io"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	goredis "github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

var update = flag.Bool("update", false, "write testdata/exposition.txt and the table of README.md")

// fixed is a source whose stats do not change.
type fixed mesh.Stats

func (f fixed) Stats() mesh.Stats { return mesh.Stats(f) }

// full returns stats in which every number is different.
func full(t testing.TB) mesh.Stats {
	t.Helper()
	var st mesh.Stats
	for i := range reflect.TypeFor[mesh.Stats]().NumField() {
		disturb(t, &st, i, uint64(10*(i+1)))
	}
	return st
}

// disturb sets one field to a value made of n.
func disturb(t testing.TB, st *mesh.Stats, field int, n uint64) {
	t.Helper()
	f := reflect.ValueOf(st).Elem().Field(field)
	name := reflect.TypeFor[mesh.Stats]().Field(field).Name
	switch v := f.Addr().Interface().(type) {
	case *int:
		*v = int(n)
	case *int64:
		*v = int64(n)
	case *uint64:
		*v = n
	case *bool:
		*v = true
	case *string:
		*v = "name"
	case *time.Duration:
		*v = time.Duration(n) * time.Second
	case *map[string]uint64:
		*v = make(map[string]uint64)
		for i, key := range keysOf(t, name) {
			(*v)[key] = n + uint64(i)
		}
	case *mesh.Histogram:
		bounds := []time.Duration{100 * time.Microsecond, time.Millisecond, 2 * time.Second}
		h, err := mesh.NewHistogram(bounds, []uint64{n, 2, 0, 1}, time.Duration(n)*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		*v = h
	default:
		t.Fatalf("field %s: the test does not know its type", name)
	}
}

// keysOf returns the keys of a map in a server's stats, sorted.
func keysOf(t testing.TB, field string) []string {
	t.Helper()
	client := goredis.NewClient(&goredis.Options{Addr: "127.0.0.1:1"}) // it is never asked
	defer client.Close()
	srv, err := mesh.NewServer(mesh.Options{Redis: client})
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, key := range reflect.ValueOf(srv.Stats()).FieldByName(field).MapKeys() {
		keys = append(keys, key.String())
	}
	slices.Sort(keys)
	return keys
}

// exposition returns the text of a scrape.
func exposition(t testing.TB, c prometheus.Collector) string {
	t.Helper()
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(c); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, family := range families {
		if _, err := expfmt.MetricFamilyToText(&text, family); err != nil {
			t.Fatal(err)
		}
	}
	return text.String()
}

func TestLint(t *testing.T) {
	t.Parallel()
	for _, src := range []Source{fixed(full(t)), fixed{}} {
		problems, err := testutil.CollectAndLint(NewCollector(src, Options{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

func TestExposition(t *testing.T) {
	t.Parallel()
	const golden = "testdata/exposition.txt"
	got := exposition(t, NewCollector(fixed(full(t)), Options{}))
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("differs from %s (go test -update writes it):\n%s", golden, got)
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	labels := prometheus.Labels{"server": "a"}
	c := NewCollector(fixed{Connections: 3}, Options{Namespace: "chat", ConstLabels: labels})
	labels["server"] = "b" // the collector has a copy
	text := exposition(t, c)
	if !strings.Contains(text, "\nchat_connections{server=\"a\"} 3\n") || strings.Contains(text, "mesh_") {
		t.Errorf("not under its name:\n%s", text)
	}
}

func TestInvalidInputFailsAtRegistration(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		src  Source
		opts Options
	}{
		{"no source", nil, Options{}},
		{"invalid name", fixed{}, Options{Namespace: "\xff"}},
		{"invalid label", fixed{}, Options{ConstLabels: prometheus.Labels{"\xff": "x"}}},
		{"label twice", fixed{}, Options{ConstLabels: prometheus.Labels{"cause": "x"}}},
		{"invalid value", fixed{}, Options{ConstLabels: prometheus.Labels{"server": "\xff"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			reg := prometheus.NewRegistry()
			c := NewCollector(tt.src, tt.opts)
			if err := reg.Register(c); err == nil {
				t.Error("registered")
			}
			out := make(chan prometheus.Metric, 1000)
			c.Collect(out)
			close(out)
			refused := 0
			for made := range out {
				if err := made.Write(&dto.Metric{}); err != nil {
					refused++
				}
			}
			if refused == 0 {
				t.Error("everything was collected")
			}
		})
	}
}

func TestSeveralServersInOneRegistry(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewPedanticRegistry()
	for i, name := range []string{"a", "b"} {
		c := NewCollector(fixed{Connections: i + 1}, Options{ConstLabels: prometheus.Labels{"server": name}})
		if err := reg.Register(c); err != nil {
			t.Fatal(err)
		}
	}
	err := reg.Register(NewCollector(fixed{}, Options{ConstLabels: prometheus.Labels{"server": "b"}}))
	var twice prometheus.AlreadyRegisteredError
	if !errors.As(err, &twice) {
		t.Errorf("registered twice: %v", err)
	}
	const want = `# HELP mesh_connections Open connections of this server.
# TYPE mesh_connections gauge
mesh_connections{server="a"} 1
mesh_connections{server="b"} 2
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "mesh_connections"); err != nil {
		t.Error(err)
	}
}

// Concurrent collections of a busy server are complete and consistent. The pedantic
// registry checks that.
func TestCollectFromABusyServer(t *testing.T) {
	t.Parallel()
	redis, err := meshtest.NewRedis()
	if err != nil {
		t.Fatal(err)
	}
	defer redis.Close()
	client := redis.Client()
	defer client.Close()
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: client, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewPedanticRegistry()
	if err := reg.Register(NewCollector(p, Options{})); err != nil {
		t.Fatal(err)
	}
	if err := p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.Connect(t.Context(), "a", nil); err != nil {
		t.Fatal(err)
	}
	const rounds = 20
	var work sync.WaitGroup
	work.Go(func() {
		for range rounds {
			if err := p.Join(t.Context(), "lobby", "a"); err != nil {
				t.Error(err)
			}
			if _, err := p.Leave(t.Context(), "lobby", "a"); err != nil {
				t.Error(err)
			}
		}
	})
	for range 4 {
		work.Go(func() {
			for range rounds {
				if _, err := reg.Gather(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	if err := p.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	const want = `# HELP mesh_leaves_total Entries that this server ended, its own and those of others.
# TYPE mesh_leaves_total counter
mesh_leaves_total{cause="closed"} 0
mesh_leaves_total{cause="expired"} 0
mesh_leaves_total{cause="left"} 20
mesh_leaves_total{cause="server_lost"} 0
mesh_leaves_total{cause="silent"} 0
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "mesh_leaves_total"); err != nil {
		t.Error(err)
	}
}
