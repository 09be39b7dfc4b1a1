package meshtest_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/meshpresence/mesh/meshtest"
)

// This example starts a Redis in the process and receives an expired event.
func ExampleNewRedis() {
	ctx := context.Background()
	r, err := meshtest.NewRedis(meshtest.WithKeyspaceEvents("Ex"))
	if err != nil {
		log.Fatal(err)
	}
	defer func() {
		if err := r.Close(); err != nil {
			log.Fatal(err)
		}
	}()

	client := r.Client()
	sub := client.Subscribe(ctx, "__keyevent@0__:expired")
	defer func() { _ = sub.Close() }()
	if _, err := sub.Receive(ctx); err != nil { // wait until it is subscribed
		log.Fatal(err)
	}
	if err := client.Set(ctx, "typing:ada", 1, time.Hour).Err(); err != nil {
		log.Fatal(err)
	}

	r.Advance(time.Hour)
	m, err := sub.ReceiveMessage(ctx)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(m.Channel, m.Payload)
	// Output: __keyevent@0__:expired typing:ada
}

// This example cuts all connections to Redis. Clients notice that and reconnect later.
func ExampleRedis_Cut() {
	ctx := context.Background()
	r, err := meshtest.NewRedis()
	if err != nil {
		log.Fatal(err)
	}
	defer func() {
		if err := r.Close(); err != nil {
			log.Fatal(err)
		}
	}()

	client := r.Client()
	client.Set(ctx, "room", "lobby", 0)
	r.Cut()
	_, err = r.Dial()
	fmt.Println("cut:", err)
	r.Heal()
	fmt.Println("healed:", client.Get(ctx, "room").Val())
	// Output:
	// cut: dial memory meshtest: connection refused
	// healed: lobby
}
