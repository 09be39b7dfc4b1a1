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

// BenchmarkNeighbour sends one state from one neighbour to the other per iteration,
// first alone and then during an attack on the same server. It reports both latencies
// and their ratio. On few processors, the work of the attackers adds to them.
func BenchmarkNeighbour(b *testing.B) {
	for _, a := range []struct {
		name string
		conf harness.ChildConfig
		run  func(f *target, stop <-chan struct{})
	}{
		{"flood", harness.ChildConfig{}, reconnecting(func(e *attacker) {
			e.flood(10_000, time.Second, noop)
		})},
		{"large frames", harness.ChildConfig{}, reconnecting(func(e *attacker) {
			padded := strings.Repeat(" ", 60_000)
			e.flood(500, time.Second, func(i int) string { return noop(i) + padded })
		})},
		{"reconnects", harness.ChildConfig{Limits: mesh.Limits{UpgradesPerSecond: 200}}, reconnecting(func(*attacker) {})},
		{"join storm", harness.ChildConfig{Limits: unlimited}, reconnecting(func(e *attacker) {
			e.flood(1000, time.Second, func(i int) string {
				return fmt.Sprintf(`{"id":%d,%s}`, i, body([]string{"join-room", "leave-room"}[i%2], "stormy", ""))
			})
		})},
		{"large states", harness.ChildConfig{}, reconnecting(func(e *attacker) {
			_ = e.text(`{"id":1,` + body("join-room", home, "") + `}`)
			state := `,"state":{"x":"` + strings.Repeat("x", 8<<10-8) + `"}`
			e.flood(100, time.Second, func(i int) string { return fmt.Sprintf(`{"id":%d,%s}`, i, body("publish-presence-state", home, state)) })
		})},
		{"metadata", harness.ChildConfig{Metadata: true}, reconnecting(func(e *attacker) {
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
			f := newTarget(b, a.conf)
			f.pair.publish(rounds, nil)
			stop := make(chan struct{})
			var busy, alone latencies
			var attackers sync.WaitGroup
			for b.Loop() {
				alone = append(alone, f.pair.publish(1, nil)...)
			}
			for range 2 {
				attackers.Go(func() { a.run(f, stop) })
			}
			time.Sleep(time.Second) // until the attack has begun
			begun := time.Now()
			for len(busy) < len(alone) || time.Since(begun) < time.Second {
				busy = append(busy, f.pair.publish(1, nil)...)
				require.NoError(b, f.pair.err)
			}
			close(stop)
			attackers.Wait()
			for _, m := range []struct {
				unit    string
				percent int
			}{{"p50", 50}, {"p99", 99}} {
				b.ReportMetric(millis(alone.at(m.percent)), "ms/"+m.unit+"-alone")
				b.ReportMetric(millis(busy.at(m.percent)), "ms/"+m.unit+"-attacked")
				b.ReportMetric(ratio(busy.at(m.percent), alone.at(m.percent)), m.unit+"-ratio")
			}
		})
	}
}

// reconnecting attacks with one connection after the other until stop is closed.
func reconnecting(attack func(e *attacker)) func(f *target, stop <-chan struct{}) {
	return func(f *target, stop <-chan struct{}) {
		for {
			select {
			case <-stop:
				return
			default:
			}
			e, _, err := tryDial(f.t, f.Addr)
			if err != nil {
				continue // refused with Retry-After
			}
			ended := e.listen()
			attack(e)
			e.drop()
			<-ended
		}
	}
}
