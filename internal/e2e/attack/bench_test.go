package attack

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// BenchmarkNeighbour is one state from one neighbour to the other per
// iteration, first alone and then under an attack that goes on all the while,
// on the same server. It reports both and how they compare. On few processors
// the attackers' own work is in it.
func BenchmarkNeighbour(b *testing.B) {
	for _, a := range []struct {
		name string
		conf harness.ChildConfig
		run  func(f *fort, stop <-chan struct{})
	}{
		{"flood", harness.ChildConfig{}, comeBack(func(e *enemy) {
			e.flood(10_000, time.Second, noop)
		})},
		{"large frames", harness.ChildConfig{}, comeBack(func(e *enemy) {
			padded := strings.Repeat(" ", 60_000)
			e.flood(500, time.Second, func(i int) string { return noop(i) + padded })
		})},
		{"reconnects", harness.ChildConfig{Limits: mesh.Limits{UpgradesPerSecond: 200}}, comeBack(func(*enemy) {})},
		{"join storm", harness.ChildConfig{Limits: unlimited}, comeBack(func(e *enemy) {
			e.flood(1000, time.Second, func(i int) string {
				return fmt.Sprintf(`{"id":%d,%s}`, i, body([]string{"join-room", "leave-room"}[i%2], "stormy", ""))
			})
		})},
		{"large states", harness.ChildConfig{}, comeBack(func(e *enemy) {
			_ = e.text(`{"id":1,` + body("join-room", home, "") + `}`)
			state := `,"state":{"x":"` + strings.Repeat("x", 8<<10-8) + `"}`
			e.flood(100, time.Second, func(i int) string { return fmt.Sprintf(`{"id":%d,%s}`, i, body("publish-presence-state", home, state)) })
		})},
		{"metadata", harness.ChildConfig{Metadata: true}, comeBack(func(e *enemy) {
			for i := range 100 {
				_ = e.text(fmt.Sprintf(`{"id":1,%s}`, body("join-room", fmt.Sprintf("room%d", i), "")))
				time.Sleep(2 * time.Millisecond)
			}
			metadata := strings.Repeat("x", 16<<10-16)
			e.flood(20, 3*time.Second, func(i int) string {
				return fmt.Sprintf(`{"id":%d,"command":"mesh/set-my-connection-metadata","payload":{"metadata":"%08d%s"}}`, i, i, metadata)
			})
		})},
	} {
		b.Run(a.name, func(b *testing.B) {
			f := newFort(b, a.conf)
			f.pair.speak(rounds, nil)
			stop := make(chan struct{})
			var busy, quiet latencies
			var attackers sync.WaitGroup
			for b.Loop() {
				quiet = append(quiet, f.pair.speak(1, nil)...)
			}
			for range 2 {
				attackers.Go(func() { a.run(f, stop) })
			}
			time.Sleep(time.Second) // it begins
			begun := time.Now()
			for len(busy) < len(quiet) || time.Since(begun) < time.Second {
				busy = append(busy, f.pair.speak(1, nil)...)
				require.NoError(b, f.pair.err)
			}
			close(stop)
			attackers.Wait()
			for _, m := range []struct {
				unit    string
				percent int
			}{{"p50", 50}, {"p99", 99}} {
				b.ReportMetric(millis(quiet.at(m.percent)), "ms/"+m.unit+"-alone")
				b.ReportMetric(millis(busy.at(m.percent)), "ms/"+m.unit+"-attacked")
				b.ReportMetric(ratio(busy.at(m.percent), quiet.at(m.percent)), m.unit+"-ratio")
			}
		})
	}
}

// comeBack attacks with one connection after the other until told to stop.
func comeBack(attack func(e *enemy)) func(f *fort, stop <-chan struct{}) {
	return func(f *fort, stop <-chan struct{}) {
		for {
			select {
			case <-stop:
				return
			default:
			}
			e, _, err := tryEnemy(f.t, f.Addr)
			if err != nil {
				continue // it is told to come back later
			}
			ended := e.listen()
			attack(e)
			e.gone()
			<-ended
		}
	}
}
