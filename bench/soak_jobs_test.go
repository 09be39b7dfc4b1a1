package bench

import (
	"context"
	"errors"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

// soaking is the soak of this process, if it is one of the clients.
var soaking *load.Soak

// soakServer is the report of a server.
type soakServer struct {
	Memory peer.Memory
	Stats  mesh.Stats
	CPU    float64 // seconds so far
}

// soakClients is the report of a process of clients.
type soakClients struct {
	load.SoakCounts
	CPU float64
}

var (
	serveSoak = newJob("soak serve", func(cfg peer.MemberConfig) (_ string, err error) {
		if member, err = peer.NewMember(context.Background(), cfg); err != nil { // ends with the process, or by drainSoak
			return "", err
		}
		return member.Addr, nil
	})
	drainSoak = newJob("soak drain", func(spread time.Duration) (bool, error) {
		ctx, cancel := context.WithTimeout(context.Background(), spread+20*time.Second)
		defer cancel()
		return true, member.Stop(ctx, spread)
	})
	lookSoak = newJob("soak look", func(bool) (s soakServer, err error) {
		s.Memory, err = peer.ReadMemory()
		s.Stats = member.Server.Stats()
		s.CPU = peer.ProcessorTime()
		return s, err
	})

	startSoak = newJob("soak start", func(cfg load.SoakConfig) (bool, error) { soaking = load.StartSoak(cfg); return true, nil })
	pointSoak = newJob("soak point", func(addrs []string) (bool, error) { soaking.SetAddrs(addrs); return true, nil })
	pauseSoak = newJob("soak pause", func(paused bool) (bool, error) { soaking.Pause(paused); return true, nil })
	// settleSoak returns the number of clients that still wait for something.
	settleSoak = newJob("soak settle", func(within time.Duration) (int, error) { return soaking.Settle(within), nil })
	truthSoak  = newJob("soak truth", func(bool) (load.SoakTruth, error) { return soaking.Truth(context.Background()) })
	countSoak  = newJob("soak count", func(bool) (soakClients, error) {
		if soaking == nil {
			return soakClients{}, errors.New("no soak")
		}
		return soakClients{SoakCounts: soaking.Counts(), CPU: peer.ProcessorTime()}, nil
	})
	stopSoak = newJob("soak stop", func(bool) (bool, error) { soaking.Stop(); return true, nil })
)
